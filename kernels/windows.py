"""Where the windows of a soft split lie: what the kernels of both soft splits share.

An image is any tensor that four strides can walk; a token grid (B, H*W, C) is the image (B, C, H, W) of the same
memory. Windows are numbered as the tokens they become, row by row and image by image; the features of a window in the
order (c, i, j) of :class:`torch.nn.Unfold`, or (i, j, c) where a kernel wants neighbouring channels together.
Offsets of images are 64-bit, those within an image, positions and token numbers 32-bit.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..ops.soft_splits.arguments import Geometry, Pair
from ..ops.soft_splits.reference import window_grid

# Blocks of features are a power of two up to this: a multiple of it is no block's remainder.
WHOLE = tl.constexpr(64)
# Sizes that change with the batch: the kernels are compiled once for all of them.
GROW_WITH_THE_BATCH = ("num_tokens", "num_pixels", "tokens_per_split")


class Window(NamedTuple):
    """What a kernel is compiled for."""

    channels: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    channels_last: bool  # features in the order (i, j, c)

    @property
    def num_features(self) -> int:
        return self.channels * self.kernel_h * self.kernel_w

    @property
    def geometry(self) -> Geometry:
        kernel_size, stride = (self.kernel_h, self.kernel_w), (self.stride_h, self.stride_w)
        return Geometry(kernel_size, stride, (self.pad_h, self.pad_w))


class View(NamedTuple):
    """Sizes and strides of an image (B, C, H, W), and of the grid of windows laid over it."""

    height: int
    width: int
    grid_h: int
    grid_w: int
    stride_image: int
    stride_channel: int
    stride_row: int
    stride_col: int


def make_window(channels: int, kernel_size: Pair, stride: Pair, padding: Pair, channels_last: bool) -> Window:
    return Window(channels, *kernel_size, *stride, *padding, channels_last)


def make_view(image: Tensor, window: Window) -> View:
    grid = window_grid(image.shape[2:], window.geometry)
    if image.shape[0] * max(image.shape[2] * image.shape[3], grid[0] * grid[1]) > 2**31 - 2**16:
        raise ValueError(f"a batch of {tuple(image.shape)} has more than 2**31 pixels or tokens; split it")
    return View(*image.shape[2:], *grid, *image.stride())  # type: ignore[call-arg]  # lengths that mypy does not know


def walkable(image: Tensor, geometry: Geometry) -> Tensor:
    """``image`` (B, C, H, W), or a copy if 32 bits do not reach from its first value to the last of its windows."""
    _, *strides = image.stride()
    sizes = zip(image.shape[2:], *geometry, strict=True)
    reach = (image.shape[1], *(size + kernel + 2 * padding for size, kernel, _, padding in sizes))
    spans = sum(length * stride for length, stride in zip(reach, strides, strict=True))
    return image.contiguous() if spans >= 2**31 else image


@triton.jit
def locate_features(features, WINDOW: tl.constexpr):
    """The channel of each feature, and its row and column within the window."""
    if WINDOW.channels_last:
        channel = features % WINDOW.channels
        tap = features // WINDOW.channels
    else:
        channel = features // (WINDOW.kernel_h * WINDOW.kernel_w)
        tap = features % (WINDOW.kernel_h * WINDOW.kernel_w)
    return channel, tap // WINDOW.kernel_w, tap % WINDOW.kernel_w


@triton.jit
def locate_windows(image_ptr, tokens, num_tokens, view, WINDOW: tl.constexpr):
    """Address, first row and first column of each window; beyond the last, those of the last."""
    tokens = tl.minimum(tokens, num_tokens - 1)
    position = tokens % (view.grid_h * view.grid_w)
    top = (position // view.grid_w) * WINDOW.stride_h - WINDOW.pad_h
    left = (position % view.grid_w) * WINDOW.stride_w - WINDOW.pad_w
    image = tokens // (view.grid_h * view.grid_w)
    ptrs = image_ptr + image.to(tl.int64) * view.stride_image + (top * view.stride_row + left * view.stride_col)
    return ptrs, top, left


@triton.jit
def load_patches(ptrs, top, left, features, view, WINDOW: tl.constexpr, MASKED: tl.constexpr):
    """Values (tokens, features) of the windows; if ``MASKED``, zeros outside of the image and beyond all features."""
    channel, i, j = locate_features(features, WINDOW)
    ptrs = ptrs[:, None] + (channel * view.stride_channel + i * view.stride_row + j * view.stride_col)[None, :]
    if not MASKED:
        patches = tl.load(ptrs)
    else:
        num_features: tl.constexpr = WINDOW.channels * WINDOW.kernel_h * WINDOW.kernel_w
        row, col = top[:, None] + i[None, :], left[:, None] + j[None, :]
        inside = (row >= 0) & (row < view.height) & (col >= 0) & (col < view.width)
        patches = tl.load(ptrs, mask=inside & (features < num_features)[None, :], other=0.0)
    return patches


@triton.jit
def load_shifts(
    ptrs, top, left, view, WINDOW: tl.constexpr, WIDE: tl.constexpr, dtype: tl.constexpr, COMPILED: tl.constexpr
):
    """The mean of up to four values of each window; ``WIDE`` is the number of blocks in a pixel, or 0."""
    total = _load_sample(ptrs, top, left, view, 0, WINDOW, WIDE).to(dtype)
    for index in tl.static_range(1, 4):
        total += _load_sample(ptrs, top, left, view, index, WINDOW, WIDE).to(dtype)
    if COMPILED and dtype == tl.float32:
        # Opaque, or the compiler computes what depends on it twice, in two layouts. The interpreter runs no assembly.
        total = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [total], tl.float32, is_pure=False, pack=1)
    return total / 4


@triton.jit
def _load_sample(ptrs, top, left, view, index: tl.constexpr, WINDOW: tl.constexpr, WIDE: tl.constexpr):
    i: tl.constexpr = index // 2 * (WINDOW.kernel_h // 2)
    if WIDE > 0:  # the first value of a block is in the window, whatever the others are
        offs = i * view.stride_row + index % 2 * (WIDE // 2) * (WINDOW.channels // WIDE) * view.stride_channel
        col = left
    else:
        j: tl.constexpr = index % 2 * (WINDOW.kernel_w // 2)
        offs = index * WINDOW.channels // 4 * view.stride_channel + i * view.stride_row + j * view.stride_col
        col = left + j
    inside = (top + i >= 0) & (top + i < view.height) & (col >= 0) & (col < view.width)
    return tl.load(ptrs + offs, mask=inside, other=0.0)
