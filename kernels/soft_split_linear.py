"""Soft split, LayerNorm and Linear as one implicit matmul; tokens as long as a patch are never written.

Forward gathers windows tile by tile, multiplies them by the centred weights W_c (the LayerNorm folded in, see
:mod:`t2t_fast.ops.soft_splits.aten`) and collects each window's mean and variance on the way::

    tokens = rstd(u) (W_c u) + offset

The window is shifted by the mean of some of its own values first. That changes neither W_c u, since the rows of
W_c sum to zero, nor the variance, and it keeps both exact where a patch hardly varies around a large mean: the
variance of n values is at least (value - mean)² / n, so the difference of the two sums cannot cancel further than that.

Backward gathers the windows again. With g the incoming gradient and z = (u - mean) rstd the normalised window::

    dW_c    = Σ g zᵀ        over a fixed number of token ranges, added up in order
    doffset = Σ g
    dx      = Σ over the windows that cover x of  rstd (W_cᵀ g) - rstd² c (x - mean),   c = g · (tokens - offset) / n

dx is a gather too: pixels whose position leaves the same remainder by the stride are covered by the same taps, so each
such class is a dense matmul without a wasted tap.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import Launch, chip_of, precision
from .windows import GROW_WITH_THE_BATCH, View, Window, load_patches, make_view

# Values of a window whose mean is its shift.
SAMPLES = 16


class Statistics(NamedTuple):
    """Mean and 1/sqrt(variance + eps) of every window (B, L)."""

    mean: Tensor
    rstd: Tensor


@triton.jit
def shift_of(image_ptr, tokens, num_tokens, view, WINDOW: tl.constexpr, SAMPLES: tl.constexpr, dtype: tl.constexpr):
    """The mean of some of each window's values."""
    features = tl.arange(0, SAMPLES) * (WINDOW.channels * WINDOW.kernel_h * WINDOW.kernel_w) // SAMPLES
    return tl.sum(load_patches(image_ptr, tokens, features, num_tokens, view, WINDOW).to(dtype), 1) / SAMPLES


@triton.jit
def statistics_of(window_sum, squares, num_features, EPS: tl.constexpr):
    """Mean and rstd from the sums of values and of squares."""
    mean = window_sum / num_features
    return mean, 1.0 / tl.sqrt(tl.maximum(squares / num_features - mean * mean, 0.0) + EPS)


@triton.jit(do_not_specialize=GROW_WITH_THE_BATCH)
def _soft_split_linear_forward_kernel(
    image_ptr,
    weight_ptr,
    offset_ptr,
    tokens_ptr,
    mean_ptr,
    rstd_ptr,
    num_tokens,
    out_features,
    weight_stride,
    view,
    WINDOW: tl.constexpr,
    EPS: tl.constexpr,
    SAMPLES: tl.constexpr,
    NORM: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    KEEP_STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    operand: tl.constexpr = weight_ptr.dtype.element_ty
    accumulator: tl.constexpr = tl.float64 if operand == tl.float64 else tl.float32
    # A shifted float16 value may lie beyond float16; half of it cannot.
    SCALE: tl.constexpr = 0.5 if operand == tl.float16 and NORM else 1.0
    num_features = WINDOW.channels * WINDOW.kernel_h * WINDOW.kernel_w
    offs_token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    offs_out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    mask_token = offs_token < num_tokens
    mask_out = offs_out < out_features
    products = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), accumulator)
    window_sum = tl.zeros((BLOCK_TOKENS,), accumulator)
    squares = tl.zeros((BLOCK_TOKENS,), accumulator)
    if NORM:
        shift = shift_of(image_ptr, offs_token, num_tokens, view, WINDOW, SAMPLES, accumulator)
    for start in range(0, num_features, BLOCK_FEATURES):
        offs_feature = start + tl.arange(0, BLOCK_FEATURES)
        mask_feature = offs_feature < num_features
        patches = load_patches(image_ptr, offs_token, offs_feature, num_tokens, view, WINDOW)
        weight = tl.load(
            weight_ptr + offs_out.to(tl.int64)[None, :] * weight_stride + offs_feature[:, None],
            mask=mask_feature[:, None] & mask_out[None, :],
            other=0.0,
        )
        if NORM:
            shifted = tl.where(mask_feature[None, :], patches.to(accumulator) - shift[:, None], 0.0)
            window_sum += tl.sum(shifted, 1)
            squares += tl.sum(shifted * shifted, 1)
            values = (shifted * SCALE).to(operand)
        else:
            values = patches.to(operand)
        products = tl.dot(values, weight, products, input_precision=PRECISION, out_dtype=accumulator)
    if NORM:
        mean, rstd = statistics_of(window_sum, squares, num_features, EPS)
        products *= (rstd / SCALE)[:, None]
        if KEEP_STATISTICS:
            if tl.program_id(1) == 0:
                tl.store(mean_ptr + offs_token, mean + shift, mask=mask_token)
                tl.store(rstd_ptr + offs_token, rstd, mask=mask_token)
    if HAS_OFFSET:
        products += tl.load(offset_ptr + offs_out, mask=mask_out, other=0.0).to(accumulator)[None, :]
    offs = offs_token.to(tl.int64)[:, None] * out_features + offs_out[None, :]
    mask = mask_token[:, None] & mask_out[None, :]
    tl.store(tokens_ptr + offs, products.to(tokens_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=GROW_WITH_THE_BATCH)
def _soft_split_linear_backward_weight_kernel(
    grad_ptr,
    image_ptr,
    mean_ptr,
    rstd_ptr,
    d_weight_ptr,
    d_offset_ptr,
    num_tokens,
    tokens_per_split,
    out_features,
    view,
    WINDOW: tl.constexpr,
    NORM: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    accumulator: tl.constexpr = d_weight_ptr.dtype.element_ty
    num_features = WINDOW.channels * WINDOW.kernel_h * WINDOW.kernel_w
    split = tl.program_id(0)
    offs_out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    offs_feature = tl.program_id(2) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    mask_out = offs_out < out_features
    d_weight = tl.zeros((BLOCK_OUT, BLOCK_FEATURES), accumulator)
    d_offset = tl.zeros((BLOCK_OUT,), accumulator)
    first = split * tokens_per_split
    for start in range(first, tl.minimum(first + tokens_per_split, num_tokens), BLOCK_TOKENS):
        offs_token = start + tl.arange(0, BLOCK_TOKENS)
        mask_token = offs_token < num_tokens
        grad = tl.load(
            grad_ptr + offs_token.to(tl.int64)[:, None] * out_features + offs_out[None, :],
            mask=mask_token[:, None] & mask_out[None, :],
            other=0.0,
        )
        patches = load_patches(image_ptr, offs_token, offs_feature, num_tokens, view, WINDOW)
        if NORM:
            mean = tl.load(mean_ptr + offs_token, mask=mask_token, other=0.0)
            rstd = tl.load(rstd_ptr + offs_token, mask=mask_token, other=0.0)
            normed = (patches.to(accumulator) - mean[:, None]) * rstd[:, None]
            values = tl.where((offs_feature < num_features)[None, :], normed, 0.0).to(OPERAND)
        else:
            values = patches.to(OPERAND)
        d_weight = tl.dot(
            tl.trans(grad.to(OPERAND)), values, d_weight, input_precision=PRECISION, out_dtype=accumulator
        )
        if HAS_OFFSET:
            d_offset += tl.sum(grad.to(accumulator), 0)
    row = (split * out_features + offs_out).to(tl.int64)
    mask = mask_out[:, None] & (offs_feature < num_features)[None, :]
    tl.store(d_weight_ptr + row[:, None] * num_features + offs_feature[None, :], d_weight, mask=mask)
    if HAS_OFFSET:
        if tl.program_id(2) == 0:
            tl.store(d_offset_ptr + row, d_offset, mask=mask_out)


@triton.jit(do_not_specialize=GROW_WITH_THE_BATCH)
def _soft_split_linear_coefficient_kernel(
    grad_ptr,
    tokens_ptr,
    offset_ptr,
    rstd_ptr,
    coefficient_ptr,
    num_tokens,
    out_features,
    num_features,
    HAS_OFFSET: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """rstd² c of every token."""
    accumulator: tl.constexpr = coefficient_ptr.dtype.element_ty
    offs_token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    mask_token = offs_token < num_tokens
    along = tl.zeros((BLOCK_TOKENS,), accumulator)
    for start in range(0, out_features, BLOCK_OUT):
        offs_out = start + tl.arange(0, BLOCK_OUT)
        mask_out = offs_out < out_features
        offs = offs_token.to(tl.int64)[:, None] * out_features + offs_out[None, :]
        mask = mask_token[:, None] & mask_out[None, :]
        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(accumulator)
        tokens = tl.load(tokens_ptr + offs, mask=mask, other=0.0).to(accumulator)
        if HAS_OFFSET:
            tokens -= tl.load(offset_ptr + offs_out, mask=mask_out, other=0.0).to(accumulator)[None, :]
        along += tl.sum(grad * tokens, 1)
    rstd = tl.load(rstd_ptr + offs_token, mask=mask_token, other=0.0)
    tl.store(coefficient_ptr + offs_token, along * rstd * rstd / num_features, mask=mask_token)


@triton.jit(do_not_specialize=GROW_WITH_THE_BATCH)
def _soft_split_linear_backward_input_kernel(
    grad_ptr,
    weight_ptr,
    image_ptr,
    mean_ptr,
    rstd_ptr,
    coefficient_ptr,
    d_image_ptr,
    num_pixels,
    class_h,
    class_w,
    out_features,
    weight_stride,
    view,
    d_view,
    WINDOW: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    stored: tl.constexpr = weight_ptr.dtype.element_ty
    accumulator: tl.constexpr = tl.float64 if stored == tl.float64 else tl.float32
    # g rstd may lie beyond float16, which has no more digits than TF32.
    operand: tl.constexpr = tl.float32 if stored == tl.float16 and NORM else stored
    remainder = tl.program_id(0) % (WINDOW.stride_h * WINDOW.stride_w)
    class_row = remainder // WINDOW.stride_w
    class_col = remainder % WINDOW.stride_w
    tile = tl.program_id(0) // (WINDOW.stride_h * WINDOW.stride_w)
    offs_pixel = tile * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    image = offs_pixel // (class_h * class_w)
    row = offs_pixel % (class_h * class_w) // class_w * WINDOW.stride_h + class_row
    col = offs_pixel % class_w * WINDOW.stride_w + class_col
    mask_pixel = (offs_pixel < num_pixels) & (row < view.height) & (col < view.width)
    mask_channel = channel < WINDOW.channels
    mask = mask_pixel[:, None] & mask_channel[None, :]

    first_i = (class_row + WINDOW.pad_h) % WINDOW.stride_h
    first_j = (class_col + WINDOW.pad_w) % WINDOW.stride_w
    taps_h = (WINDOW.kernel_h - first_i + WINDOW.stride_h - 1) // WINDOW.stride_h
    taps_w = (WINDOW.kernel_w - first_j + WINDOW.stride_w - 1) // WINDOW.stride_w
    blocks = tl.cdiv(out_features, BLOCK_OUT)
    d_image = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), accumulator)
    for step in range(taps_h * taps_w * blocks):
        tap = step // blocks
        i, j = _locate_tap(tap, first_i, first_j, taps_w, WINDOW)
        token, covers = _covering_token(image, row, col, i, j, view, WINDOW)
        offs_out = step % blocks * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        mask_out = offs_out < out_features
        grad = tl.load(
            grad_ptr + token.to(tl.int64)[:, None] * out_features + offs_out[None, :],
            mask=(mask_pixel & covers)[:, None] & mask_out[None, :],
            other=0.0,
        )
        if NORM:
            rstd = tl.load(rstd_ptr + token, mask=mask_pixel & covers, other=0.0)
            grad = grad.to(accumulator) * rstd[:, None]
        offs_feature = _feature_of(channel, i, j, WINDOW)
        weight = tl.load(
            weight_ptr + offs_out.to(tl.int64)[:, None] * weight_stride + offs_feature[None, :],
            mask=mask_out[:, None] & mask_channel[None, :],
            other=0.0,
        )
        d_image = tl.dot(
            grad.to(operand), weight.to(operand), d_image, input_precision=PRECISION, out_dtype=accumulator
        )

    if NORM:
        ptrs = _pixel_ptrs(image_ptr, image, row, col, channel, view)
        pixels = tl.load(ptrs, mask=mask, other=0.0).to(accumulator)
        for tap in range(taps_h * taps_w):
            i, j = _locate_tap(tap, first_i, first_j, taps_w, WINDOW)
            token, covers = _covering_token(image, row, col, i, j, view, WINDOW)
            mean = tl.load(mean_ptr + token, mask=mask_pixel & covers, other=0.0)
            coefficient = tl.load(coefficient_ptr + token, mask=mask_pixel & covers, other=0.0)
            d_image -= coefficient[:, None] * (pixels - mean[:, None])
    ptrs = _pixel_ptrs(d_image_ptr, image, row, col, channel, d_view)
    tl.store(ptrs, d_image.to(d_image_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _locate_tap(tap, first_i, first_j, taps_w, WINDOW: tl.constexpr):
    """Row and column within the window of one of the taps that cover a class of pixels."""
    return first_i + tap // taps_w * WINDOW.stride_h, first_j + tap % taps_w * WINDOW.stride_w


@triton.jit
def _feature_of(channel, i, j, WINDOW: tl.constexpr):
    """The place of a window's value in the order of the weight's columns."""
    if WINDOW.channels_last:
        feature = (i * WINDOW.kernel_w + j) * WINDOW.channels + channel
    else:
        feature = channel * (WINDOW.kernel_h * WINDOW.kernel_w) + i * WINDOW.kernel_w + j
    return feature


@triton.jit
def _pixel_ptrs(ptr, image, row, col, channel, view):
    """The addresses of a tile (pixels, channels)."""
    offs = image.to(tl.int64) * view.stride_image + row.to(tl.int64) * view.stride_row
    offs += col.to(tl.int64) * view.stride_col
    return ptr + offs[:, None] + (channel.to(tl.int64) * view.stride_channel)[None, :]


@triton.jit
def _covering_token(image, row, col, i, j, view, WINDOW: tl.constexpr):
    """The token whose window has a pixel at its row ``i`` and column ``j``, and whether there is one."""
    grid_row = (row + WINDOW.pad_h - i) // WINDOW.stride_h
    grid_col = (col + WINDOW.pad_w - j) // WINDOW.stride_w
    covers = (grid_row >= 0) & (grid_row < view.grid_h) & (grid_col >= 0) & (grid_col < view.grid_w)
    return image * (view.grid_h * view.grid_w) + grid_row * view.grid_w + grid_col, covers


def pack_weight(weight: Tensor, window: Window, dtype: torch.dtype) -> Tensor:
    """Weights (out, C*kh*kw) in the kernels' feature order and dtype, rows padded with zeros to 16 values."""
    if window.channels_last:
        taps = (window.channels, window.kernel_h, window.kernel_w)
        weight = weight.unflatten(1, taps).permute(0, 2, 3, 1).flatten(1)
    return F.pad(weight.to(dtype), (0, -window.num_features % 16)).contiguous()


def unpack_weight(packed: Tensor, window: Window) -> Tensor:
    """Columns (out, C*kh*kw) back from the kernels' feature order into (c, i, j)."""
    if not window.channels_last:
        return packed
    return packed.unflatten(1, (window.kernel_h, window.kernel_w, window.channels)).permute(0, 3, 1, 2).flatten(1)


def forward_launch(
    image: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    tokens: Tensor,
    statistics: Statistics | None,
    view: View,
    window: Window,
    norm: bool,
    eps: float,
) -> Launch:
    """Fill ``tokens`` (B, L, out), contiguous, and ``statistics``, mean and rstd (B, L), if wanted.

    ``weight`` comes from :func:`pack_weight`; with ``norm`` its rows sum to zero.
    """
    num_tokens, out_features = image.shape[0] * view.grid_h * view.grid_w, weight.shape[0]
    config = configs.pick(configs.SOFT_SPLIT_LINEAR_FORWARD, image.device, weight.dtype, out=out_features)
    mean, rstd = statistics or (None, None)
    grid = (
        triton.cdiv(num_tokens, config.blocks["BLOCK_TOKENS"]),
        triton.cdiv(out_features, config.blocks["BLOCK_OUT"]),
    )
    args = (image, weight, offset, tokens, mean, rstd, num_tokens, out_features, weight.stride(0), view)
    constants = {
        "WINDOW": window,
        "EPS": eps,
        "SAMPLES": SAMPLES,
        "NORM": norm,
        "HAS_OFFSET": offset is not None,
        "KEEP_STATISTICS": statistics is not None,
        "PRECISION": precision(weight.dtype),
    }
    return Launch(_soft_split_linear_forward_kernel, grid, args, constants, config)


def num_splits(num_tokens: int, window: Window, out_features: int, dtype: torch.dtype, device: torch.device) -> int:
    """Into how many token ranges :func:`backward_weight_launch` divides its sum.

    Enough to fill the chip twice, but no more than half the bytes of the long tokens.
    """
    blocks = configs.pick(configs.SOFT_SPLIT_LINEAR_BACKWARD_WEIGHT, device, dtype, out=out_features).blocks
    if num_tokens == 0 or out_features == 0:
        return 1
    tiles = triton.cdiv(out_features, blocks["BLOCK_OUT"]) * triton.cdiv(window.num_features, blocks["BLOCK_FEATURES"])
    wanted = triton.cdiv(2 * chip_of(device).multiprocessors, tiles)
    small = num_tokens * dtype.itemsize // (8 * out_features)  # a partial sum has 4 out n bytes
    return max(1, min(wanted, small, triton.cdiv(num_tokens, blocks["BLOCK_TOKENS"])))


def backward_weight_launch(
    grad: Tensor,
    image: Tensor,
    statistics: Statistics | None,
    d_weight: Tensor,
    d_offset: Tensor | None,
    dtype: torch.dtype,
    view: View,
    window: Window,
) -> Launch:
    """Fill ``d_weight`` (splits, out, C*kh*kw) and ``d_offset`` (splits, out), to be summed over the splits.

    ``dtype`` is that of the operands; columns come in the kernels' feature order.
    """
    num_tokens, out_features = image.shape[0] * view.grid_h * view.grid_w, d_weight.shape[1]
    config = configs.pick(configs.SOFT_SPLIT_LINEAR_BACKWARD_WEIGHT, image.device, dtype, out=out_features)
    blocks, splits = config.blocks, d_weight.shape[0]
    per_split = triton.cdiv(triton.cdiv(num_tokens, splits), blocks["BLOCK_TOKENS"]) * blocks["BLOCK_TOKENS"]
    mean, rstd = statistics or (None, None)
    grid = (
        splits,
        triton.cdiv(out_features, blocks["BLOCK_OUT"]),
        triton.cdiv(window.num_features, blocks["BLOCK_FEATURES"]),
    )
    args = (grad, image, mean, rstd, d_weight, d_offset, num_tokens, per_split, out_features, view)
    constants = {
        "WINDOW": window,
        "NORM": statistics is not None,
        "HAS_OFFSET": d_offset is not None,
        "PRECISION": precision(dtype),
        "OPERAND": getattr(tl, str(dtype).removeprefix("torch.")),
    }
    return Launch(_soft_split_linear_backward_weight_kernel, grid, args, constants, config)


def coefficient_launch(
    grad: Tensor, tokens: Tensor, offset: Tensor | None, rstd: Tensor, coefficient: Tensor, num_features: int
) -> Launch:
    """Fill ``coefficient`` (B, L) with what a window's variance adds to the gradient of its values."""
    config = configs.SOFT_SPLIT_LINEAR_COEFFICIENT
    num_tokens, out_features = rstd.numel(), tokens.shape[2]
    grid = (triton.cdiv(num_tokens, config.blocks["BLOCK_TOKENS"]),)
    args = (grad, tokens, offset, rstd, coefficient, num_tokens, out_features, num_features)
    return Launch(_soft_split_linear_coefficient_kernel, grid, args, {"HAS_OFFSET": offset is not None}, config)


def backward_input_launch(
    grad: Tensor,
    weight: Tensor,
    image: Tensor,
    statistics: Statistics | None,
    coefficient: Tensor | None,
    d_image: Tensor,
    view: View,
    window: Window,
) -> Launch:
    """Fill ``d_image`` (B, C, H, W).

    Windows that have ``statistics`` have a ``coefficient`` from :func:`coefficient_launch` as well.
    """
    config = configs.pick(
        configs.SOFT_SPLIT_LINEAR_BACKWARD_INPUT, image.device, weight.dtype, channels=window.channels
    )
    blocks = config.blocks
    class_h, class_w = triton.cdiv(view.height, window.stride_h), triton.cdiv(view.width, window.stride_w)
    num_pixels = image.shape[0] * class_h * class_w
    grid = (
        triton.cdiv(num_pixels, blocks["BLOCK_PIXELS"]) * window.stride_h * window.stride_w,
        triton.cdiv(window.channels, blocks["BLOCK_CHANNELS"]),
    )
    mean, rstd = statistics or (None, None)
    sizes = (num_pixels, class_h, class_w, weight.shape[0], weight.stride(0))
    args = (grad, weight, image, mean, rstd, coefficient, d_image, *sizes, view, make_view(d_image, window))
    products = "tf32" if weight.dtype == torch.float16 else precision(weight.dtype)
    constants = {"WINDOW": window, "NORM": statistics is not None, "PRECISION": products}
    return Launch(_soft_split_linear_backward_input_kernel, grid, args, constants, config)
