"""How the windows of a soft split lie for a matmul: which image is walked, and in which order a weight's columns are.

A tile of windows is loaded 16 bytes at a time where neighbouring features are neighbours in memory. A token's channels
are. The pixels of an image with few channels are not, so they are copied once into blocks as large as the stride, with
zeros for the padding: then a window is a few whole blocks, whose values lie together row by row. Values of a block that
are beyond the window are replaced by zeros.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.soft_splits.arguments import Geometry, Pair
from ..ops.soft_splits.reference import window_grid
from . import soft_split
from .launch import Config, Launch
from .windows import WHOLE, View, Window, make_view, make_window

# From this number on, a pixel's channels alone are enough to load together.
_MANY_CHANNELS = 16
_PACK = Config({"BLOCK_OUT": 16, "BLOCK_FEATURES": 64}, num_warps=4, num_stages=1)


class Windows(NamedTuple):
    """Windows of ``image`` (B, C', H', W'), which may hold the pixels of another in blocks."""

    image: Tensor
    window: Window
    view: View
    channels: int  # of the image that was split
    kernel_size: Pair  # of its windows
    block: Pair | None

    @property
    def num_values(self) -> int:
        """C*kh*kw, of the image that was split."""
        return self.channels * self.kernel_size[0] * self.kernel_size[1]

    @property
    def blocks_to_a_pixel(self) -> int:
        """How many blocks are one wide pixel of ``image``; 0 without blocks."""
        if self.block is None:
            return 0
        return self.window.channels // (self.channels * self.block[0] * self.block[1])

    @property
    def marked(self) -> bool:
        """Whether some features of the kernels are no values of the window."""
        return self.block is not None or self.num_values % WHOLE.value != 0

    @property
    def masked(self) -> bool:
        """Whether some features lie outside of ``image``."""
        padded = self.window.pad_h > 0 or self.window.pad_w > 0
        return padded or self.window.num_features % WHOLE.value != 0


def lay_windows(image: Tensor, geometry: Geometry, in_blocks: bool = True) -> Windows:
    """Windows of ``image`` (B, C, H, W); :func:`blocks_launch` must run before they are read.

    Without ``in_blocks``, the image itself is walked.
    """
    channels, (_, stride, _) = image.shape[1], geometry
    if in_blocks and channels < _MANY_CHANNELS and tuple(stride) != (1, 1) and _fits(geometry):
        windows = _lay_in_blocks(image, geometry)
        if math.prod(windows.image.shape[1:]) < 2**31:  # what 32 bits reach
            return windows
    channels_last = image.stride(1) == 1 and channels >= _MANY_CHANNELS
    window = make_window(channels, *geometry, channels_last)
    return Windows(image, window, make_view(image, window), channels, geometry.kernel_size, None)


def _taps(geometry: Geometry) -> Pair:
    """Blocks that a window covers, in each direction."""
    height, width = (triton.cdiv(k, s) for k, s in zip(geometry.kernel_size, geometry.stride, strict=True))
    return height, width


def _fits(geometry: Geometry) -> bool:
    """Whether whole blocks are not much more than the window."""
    (tap_h, tap_w), (kernel_h, kernel_w), (step_h, step_w) = _taps(geometry), geometry.kernel_size, geometry.stride
    return tap_h * step_h * tap_w * step_w <= 2 * kernel_h * kernel_w


def _lay_in_blocks(image: Tensor, geometry: Geometry) -> Windows:
    grid, (tap_h, tap_w), block = window_grid(image.shape[2:], geometry), _taps(geometry), geometry.stride
    rows, columns, width = grid[0] - 1 + tap_h, grid[1] - 1 + tap_w, image.shape[1] * block[0] * block[1]
    blocks = image.new_empty(image.shape[0], rows, columns, width).permute(0, 3, 1, 2)
    # Neighbouring blocks lie together, too: a row of a window's blocks is one wide pixel.
    window = Window(tap_w * width, tap_h, 1, 1, 1, 0, 0, channels_last=True)
    view = View(rows, columns, *grid, *blocks.stride())  # type: ignore[call-arg]  # lengths that mypy does not know
    return Windows(blocks, window, view, image.shape[1], geometry.kernel_size, block)


def blocks_launch(image: Tensor, windows: Windows, padding: Pair) -> Launch | None:
    """Fill the blocks of ``windows`` from ``image``, if they have any."""
    if windows.block is None:
        return None
    window = make_window(image.shape[1], windows.block, windows.block, padding, channels_last=False)
    rows, columns = windows.image.shape[2:]
    view = make_view(image, window)._replace(grid_h=rows, grid_w=columns)
    return soft_split.forward_launch(image, windows.image.permute(0, 2, 3, 1).flatten(1, 2), view, window)


class _Order(NamedTuple):
    """Of the columns of a packed weight: (rows of blocks, blocks of a row, C, rows of a block, columns of a block)."""

    kernel_h: int
    kernel_w: int
    taps_h: int
    taps_w: int
    channels: int
    block_h: int
    block_w: int


def _order(windows: Windows) -> _Order:
    (kernel_h, kernel_w), channels = windows.kernel_size, windows.channels
    if windows.block is not None:
        taps = windows.window.kernel_h, windows.blocks_to_a_pixel
        return _Order(kernel_h, kernel_w, *taps, channels, *windows.block)
    if windows.window.channels_last:
        return _Order(kernel_h, kernel_w, kernel_h, kernel_w, channels, 1, 1)
    return _Order(kernel_h, kernel_w, 1, 1, channels, kernel_h, kernel_w)


@triton.jit
def _pack_weight_kernel(
    weight_ptr,
    packed_ptr,
    out_features,
    weight_stride,
    ORDER: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    offs_out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    feature = tl.program_id(1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    tap = feature // (ORDER.channels * ORDER.block_h * ORDER.block_w)
    channel = feature // (ORDER.block_h * ORDER.block_w) % ORDER.channels
    i = tap // ORDER.taps_w * ORDER.block_h + feature // ORDER.block_w % ORDER.block_h
    j = tap % ORDER.taps_w * ORDER.block_w + feature % ORDER.block_w
    is_value = (tap < ORDER.taps_h * ORDER.taps_w) & (i < ORDER.kernel_h) & (j < ORDER.kernel_w)
    column = (channel * ORDER.kernel_h + i) * ORDER.kernel_w + j
    num_values = ORDER.channels * ORDER.kernel_h * ORDER.kernel_w
    mask = (offs_out < out_features)[:, None] & is_value[None, :]
    weight = tl.load(weight_ptr + offs_out[:, None] * num_values + column[None, :], mask=mask, other=0.0)
    marks = ((offs_out == out_features)[:, None] & is_value[None, :]).to(weight.dtype)
    ptrs = packed_ptr + offs_out[:, None] * weight_stride + feature[None, :]
    tl.store(ptrs, (weight + marks).to(packed_ptr.dtype.element_ty), mask=(offs_out <= out_features)[:, None])


def packed_like(weight: Tensor, windows: Windows, dtype: torch.dtype) -> Tensor:
    """An empty packed weight for :func:`pack_launch`: (out + 1, a multiple of 64)."""
    columns = triton.cdiv(windows.window.num_features, WHOLE.value) * WHOLE.value
    return weight.new_empty(weight.shape[0] + 1, columns, dtype=dtype)


def pack_launch(weight: Tensor, packed: Tensor, windows: Windows) -> Launch:
    """Fill ``packed`` with ``weight`` (out, C*kh*kw), contiguous, as the kernels read it: in their order of features.

    The last row is 1 where a feature is a value of the window; all rows are 0 where it is not.
    """
    blocks = _PACK.blocks
    grid = (
        triton.cdiv(packed.shape[0], blocks["BLOCK_OUT"]),
        triton.cdiv(packed.shape[1], blocks["BLOCK_FEATURES"]),
    )
    args = (weight, packed, weight.shape[0], packed.stride(0))
    return Launch(_pack_weight_kernel, grid, args, {"ORDER": _order(windows)}, _PACK)


def pack_weight(weight: Tensor, windows: Windows, dtype: torch.dtype) -> Tensor:
    """A weight (out, C*kh*kw) packed by :func:`pack_launch`."""
    packed = packed_like(weight, windows, dtype)
    pack_launch(weight.contiguous(), packed, windows).run(weight.device)
    return packed


def unpack_weight(packed: Tensor, windows: Windows) -> Tensor:
    """Columns (out, features) back from the kernels' order into (c, i, j): (out, C*kh*kw)."""
    order = _order(windows)
    weight = packed.unflatten(1, (order.taps_h, order.taps_w, order.channels, order.block_h, order.block_w))
    weight = weight.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    return weight[:, :, : order.kernel_h, : order.kernel_w].flatten(1)
