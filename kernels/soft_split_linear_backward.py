"""The gradients of soft split, LayerNorm and Linear, from the windows gathered again.

With g the incoming gradient, u a window, z = (u - mean) rstd and the rest as in :mod:`.soft_split_linear`::

    dW_c    = Σ g zᵀ        over a fixed number of token ranges, added up in order
    doffset = Σ g
    dx      = Σ over the windows that cover x of  rstd (W_cᵀ g) - rstd² c (x - mean),   c = g · (tokens - offset) / n

dx is a gather too: pixels whose position leaves the same remainder by the stride are covered by the same taps, so each
such class is a dense matmul without a wasted tap.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import Launch, chip_of, num_ranges, precision
from .lay_windows import Windows
from .soft_split_linear import Statistics
from .windows import GROW_WITH_THE_BATCH, load_patches, locate_windows, make_view

# Columns of a matmul that adds up: the fewest that it takes.
_ONES = tl.constexpr(16)


@triton.jit
def _load_gradient(grad_ptr, tokens, outs, num_tokens, out_features):
    """A tile (tokens, outs), zeros beyond either."""
    mask = (tokens < num_tokens)[:, None] & (outs < out_features)[None, :]
    return tl.load(grad_ptr + tokens.to(tl.int64)[:, None] * out_features + outs[None, :], mask=mask, other=0.0)


@triton.jit
def _add_gradients(total, grad):
    """``total`` (outs, _ONES) with the sum over the tokens added: as a matmul with ones, where that is exact."""
    if grad.dtype.primitive_bitwidth == 16:
        ones = tl.full((grad.shape[0], _ONES), 1.0, grad.dtype)
        total = tl.dot(tl.trans(grad), ones, total, out_dtype=total.dtype)
    else:
        total += tl.sum(grad.to(total.dtype), 0)[:, None]
    return total


@triton.jit
def _store_gradients(
    d_weight_ptr, d_offset_ptr, d_weight, d_offset, outs, features, out_features, num_features, HAS_OFFSET: tl.constexpr
):
    """The gradients of this program's range of tokens."""
    row = (tl.program_id(0) * out_features + outs).to(tl.int64)
    mask = (outs < out_features)[:, None] & (features < num_features)[None, :]
    tl.store(d_weight_ptr + row[:, None] * num_features + features[None, :], d_weight, mask=mask)
    if HAS_OFFSET:
        if tl.program_id(2) == 0:
            tl.store(d_offset_ptr + row, tl.sum(d_offset, 1) / _ONES, mask=outs < out_features)


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
    MASKED: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    accumulator: tl.constexpr = d_weight_ptr.dtype.element_ty
    num_features = WINDOW.channels * WINDOW.kernel_h * WINDOW.kernel_w
    offs_out = tl.program_id(1) * (BLOCK_OUT + BLOCK_REST) + tl.arange(0, BLOCK_OUT)
    offs_feature = tl.program_id(2) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    d_weight = tl.zeros((BLOCK_OUT, BLOCK_FEATURES), accumulator)
    d_offset = tl.zeros((BLOCK_OUT, _ONES), accumulator)
    if BLOCK_REST > 0:
        offs_rest = tl.program_id(1) * (BLOCK_OUT + BLOCK_REST) + BLOCK_OUT + tl.arange(0, BLOCK_REST)
        d_rest = tl.zeros((BLOCK_REST, BLOCK_FEATURES), accumulator)
        d_rest_offset = tl.zeros((BLOCK_REST, _ONES), accumulator)
    first = tl.program_id(0) * tokens_per_split
    for start in range(first, tl.minimum(first + tokens_per_split, num_tokens), BLOCK_TOKENS):
        offs_token = start + tl.arange(0, BLOCK_TOKENS)
        window_ptrs, top, left = locate_windows(image_ptr, offs_token, num_tokens, view, WINDOW)
        values = load_patches(window_ptrs, top, left, offs_feature, view, WINDOW, MASKED)
        if NORM:
            mask_token = offs_token < num_tokens
            mean = tl.load(mean_ptr + offs_token, mask=mask_token, other=0.0)
            rstd = tl.load(rstd_ptr + offs_token, mask=mask_token, other=0.0)
            values = (values.to(accumulator) - mean[:, None]) * rstd[:, None]
        values = values.to(OPERAND)
        grad = _load_gradient(grad_ptr, offs_token, offs_out, num_tokens, out_features)
        d_weight = tl.dot(
            tl.trans(grad.to(OPERAND)), values, d_weight, input_precision=PRECISION, out_dtype=accumulator
        )
        if HAS_OFFSET:
            if tl.program_id(2) == 0:
                d_offset = _add_gradients(d_offset, grad)
        if BLOCK_REST > 0:
            grad = _load_gradient(grad_ptr, offs_token, offs_rest, num_tokens, out_features)
            d_rest = tl.dot(
                tl.trans(grad.to(OPERAND)), values, d_rest, input_precision=PRECISION, out_dtype=accumulator
            )
            if HAS_OFFSET:
                if tl.program_id(2) == 0:
                    d_rest_offset = _add_gradients(d_rest_offset, grad)
    _store_gradients(
        d_weight_ptr, d_offset_ptr, d_weight, d_offset, offs_out, offs_feature, out_features, num_features, HAS_OFFSET
    )
    if BLOCK_REST > 0:
        _store_gradients(
            d_weight_ptr,
            d_offset_ptr,
            d_rest,
            d_rest_offset,
            offs_rest,
            offs_feature,
            out_features,
            num_features,
            HAS_OFFSET,
        )


@triton.jit(do_not_specialize=GROW_WITH_THE_BATCH)
def _soft_split_linear_coefficient_kernel(
    grad_ptr,
    tokens_ptr,
    offset_ptr,
    rstd_ptr,
    coefficient_ptr,
    scaled_ptr,
    num_tokens,
    out_features,
    num_values,
    HAS_OFFSET: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """rstd² c and rstd g of every token."""
    accumulator: tl.constexpr = coefficient_ptr.dtype.element_ty
    offs_token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    mask_token = offs_token < num_tokens
    rstd = tl.load(rstd_ptr + offs_token, mask=mask_token, other=0.0)
    along = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), accumulator)  # summed over the lanes behind the loop
    for start in range(0, out_features, BLOCK_OUT):
        offs_out = start + tl.arange(0, BLOCK_OUT)
        mask_out = offs_out < out_features
        offs = offs_token.to(tl.int64)[:, None] * out_features + offs_out[None, :]
        mask = mask_token[:, None] & mask_out[None, :]
        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(accumulator)
        tokens = tl.load(tokens_ptr + offs, mask=mask, other=0.0).to(accumulator)
        if HAS_OFFSET:
            tokens -= tl.load(offset_ptr + offs_out, mask=mask_out, other=0.0).to(accumulator)[None, :]
        along += grad * tokens
        tl.store(scaled_ptr + offs, (grad * rstd[:, None]).to(scaled_ptr.dtype.element_ty), mask=mask)
    tl.store(coefficient_ptr + offs_token, tl.sum(along, 1) * rstd * rstd / num_values, mask=mask_token)


@triton.jit(do_not_specialize=GROW_WITH_THE_BATCH)
def _soft_split_linear_backward_input_kernel(
    grad_ptr,
    weight_ptr,
    image_ptr,
    mean_ptr,
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
    operand: tl.constexpr = grad_ptr.dtype.element_ty
    accumulator: tl.constexpr = tl.float64 if operand == tl.float64 else tl.float32
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
    d_image = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), accumulator)
    if NORM:
        # Σ coefficient (x - mean) relative to the pixel's first channel, so that a large mean cancels early.
        first = tl.load(_pixel_ptrs(image_ptr, image, row, col, view), mask=mask_pixel, other=0.0).to(accumulator)
        coefficients = tl.zeros((BLOCK_PIXELS,), accumulator)
        means = tl.zeros((BLOCK_PIXELS,), accumulator)
    for tap in range(taps_h * taps_w):
        i, j = first_i + tap // taps_w * WINDOW.stride_h, first_j + tap % taps_w * WINDOW.stride_w
        token, covers = _covering_token(image, row, col, i, j, view, WINDOW)
        covers &= mask_pixel
        grad_ptrs = grad_ptr + token.to(tl.int64) * out_features
        weight_ptrs = weight_ptr + _feature_of(channel, i, j, WINDOW)
        if NORM:
            mean = tl.load(mean_ptr + token, mask=covers, other=0.0)
            coefficient = tl.load(coefficient_ptr + token, mask=covers, other=0.0)
            coefficients += coefficient
            means += coefficient * (mean - first)
        for start in range(0, out_features, BLOCK_OUT):
            offs_out = start + tl.arange(0, BLOCK_OUT)
            mask_out = offs_out < out_features
            grad = tl.load(grad_ptrs[:, None] + offs_out[None, :], mask=covers[:, None] & mask_out[None, :], other=0.0)
            weight = tl.load(
                weight_ptrs[None, :] + offs_out[:, None] * weight_stride,
                mask=mask_out[:, None] & mask_channel[None, :],
                other=0.0,
            )
            d_image = tl.dot(grad, weight.to(operand), d_image, input_precision=PRECISION, out_dtype=accumulator)
    offs_channel = channel.to(tl.int64)[None, :]
    if NORM:
        ptrs = _pixel_ptrs(image_ptr, image, row, col, view)[:, None] + offs_channel * view.stride_channel
        pixels = tl.load(ptrs, mask=mask, other=0.0).to(accumulator)
        d_image -= coefficients[:, None] * (pixels - first[:, None]) - means[:, None]
    ptrs = _pixel_ptrs(d_image_ptr, image, row, col, d_view)[:, None] + offs_channel * d_view.stride_channel
    tl.store(ptrs, d_image.to(d_image_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _feature_of(channel, i, j, WINDOW: tl.constexpr):
    """The place of a window's value in the order of the weight's columns."""
    if WINDOW.channels_last:
        feature = (i * WINDOW.kernel_w + j) * WINDOW.channels + channel
    else:
        feature = channel * (WINDOW.kernel_h * WINDOW.kernel_w) + i * WINDOW.kernel_w + j
    return feature


@triton.jit
def _pixel_ptrs(ptr, image, row, col, view):
    """The addresses of pixels, of their first channel."""
    offs = image.to(tl.int64) * view.stride_image + row.to(tl.int64) * view.stride_row
    return ptr + offs + col.to(tl.int64) * view.stride_col


@triton.jit
def _covering_token(image, row, col, i, j, view, WINDOW: tl.constexpr):
    """The token whose window has a pixel at its row ``i`` and column ``j``, and whether there is one."""
    grid_row = (row + WINDOW.pad_h - i) // WINDOW.stride_h
    grid_col = (col + WINDOW.pad_w - j) // WINDOW.stride_w
    covers = (grid_row >= 0) & (grid_row < view.grid_h) & (grid_col >= 0) & (grid_col < view.grid_w)
    return image * (view.grid_h * view.grid_w) + grid_row * view.grid_w + grid_col, covers


def scaled_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of g rstd for matmuls of ``dtype``: g rstd may lie beyond float16, which has no more digits than TF32."""
    return torch.float32 if dtype == torch.float16 else dtype


def num_splits(num_tokens: int, windows: Windows, out_features: int, dtype: torch.dtype) -> int:
    """Into how many token ranges :func:`backward_weight_launch` divides its sum.

    As many as fill the chip, if their sums have no more than half the bytes of the long tokens.
    """
    if num_tokens == 0 or out_features == 0:
        return 1
    device = windows.image.device
    config = configs.pick(configs.SOFT_SPLIT_LINEAR_BACKWARD_WEIGHT, device, dtype, out=out_features)
    blocks = config.blocks
    programs = triton.cdiv(out_features, blocks["BLOCK_OUT"] + blocks["BLOCK_REST"])
    programs *= triton.cdiv(windows.window.num_features, blocks["BLOCK_FEATURES"])
    partial = 4 * out_features * windows.window.num_features  # bytes of one range's sums
    small = num_tokens * windows.num_values * dtype.itemsize // (2 * partial)
    wanted = num_ranges(
        programs, triton.cdiv(num_tokens, blocks["BLOCK_TOKENS"]), config.resident * chip_of(device).multiprocessors
    )
    return max(1, min(wanted, small))


def backward_weight_launch(
    grad: Tensor,
    windows: Windows,
    statistics: Statistics | None,
    d_weight: Tensor,
    d_offset: Tensor | None,
    dtype: torch.dtype,
) -> Launch:
    """Fill ``d_weight`` (splits, out, features) and ``d_offset`` (splits, out), to be summed over the splits.

    ``dtype`` is that of the operands; columns come in the kernels' order.
    """
    num_tokens, out_features = grad.shape[0] * grad.shape[1], d_weight.shape[1]
    config = configs.pick(configs.SOFT_SPLIT_LINEAR_BACKWARD_WEIGHT, grad.device, dtype, out=out_features)
    blocks, splits = config.blocks, d_weight.shape[0]
    per_split = triton.cdiv(triton.cdiv(num_tokens, splits), blocks["BLOCK_TOKENS"]) * blocks["BLOCK_TOKENS"]
    mean, rstd = statistics or (None, None)
    grid = (
        splits,
        triton.cdiv(out_features, blocks["BLOCK_OUT"] + blocks["BLOCK_REST"]),
        triton.cdiv(windows.window.num_features, blocks["BLOCK_FEATURES"]),
    )
    sizes = (num_tokens, per_split, out_features, windows.view)
    args = (grad, windows.image, mean, rstd, d_weight, d_offset, *sizes)
    constants = {
        "WINDOW": windows.window,
        "NORM": statistics is not None,
        "MASKED": windows.masked,
        "HAS_OFFSET": d_offset is not None,
        "PRECISION": precision(dtype),
        "OPERAND": getattr(tl, str(dtype).removeprefix("torch.")),
    }
    return Launch(_soft_split_linear_backward_weight_kernel, grid, args, constants, config)


def coefficient_launch(
    grad: Tensor,
    tokens: Tensor,
    offset: Tensor | None,
    rstd: Tensor,
    coefficient: Tensor,
    scaled: Tensor,
    num_values: int,
) -> Launch:
    """Fill ``scaled`` (B, L, out) with g rstd; and ``coefficient`` (B, L) with what a window's variance adds to the
    gradient of its values."""
    config = configs.SOFT_SPLIT_LINEAR_COEFFICIENT
    num_tokens, out_features = rstd.numel(), tokens.shape[2]
    grid = (triton.cdiv(num_tokens, config.blocks["BLOCK_TOKENS"]),)
    args = (grad, tokens, offset, rstd, coefficient, scaled, num_tokens, out_features, num_values)
    return Launch(_soft_split_linear_coefficient_kernel, grid, args, {"HAS_OFFSET": offset is not None}, config)


def backward_input_launch(
    grad: Tensor,
    weight: Tensor,
    windows: Windows,
    mean: Tensor | None,
    coefficient: Tensor | None,
    d_image: Tensor,
) -> Launch:
    """Fill ``d_image`` (B, C, H, W), like the image of ``windows``, which are not laid in blocks.

    Windows with a LayerNorm have a ``mean`` and a ``coefficient``, and ``grad`` is scaled (:func:`coefficient_launch`).
    """
    window, view, image = windows.window, windows.view, windows.image
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
    sizes = (num_pixels, class_h, class_w, grad.shape[2], weight.stride(0))
    args = (grad, weight, image, mean, coefficient, d_image, *sizes, view, make_view(d_image, window))
    products = "tf32" if weight.dtype == torch.float16 else precision(weight.dtype)
    constants = {"WINDOW": window, "NORM": mean is not None, "PRECISION": products}
    return Launch(_soft_split_linear_backward_input_kernel, grid, args, constants, config)
