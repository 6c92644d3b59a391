"""Soft split, LayerNorm and Linear as one implicit matmul; tokens as long as a patch are never written.

Forward gathers windows tile by tile, multiplies them by the centred weights W_c (the LayerNorm folded in, see
:mod:`t2t_fast.ops.soft_splits.aten`) and collects each window's mean and variance on the way::

    tokens = rstd(u) (W_c u) + offset

The window is shifted by the mean of up to four of its values first. That changes neither W_c u, since the rows of W_c
sum to zero, nor the variance, and it keeps both exact where a patch hardly varies around a large mean: the variance of
n values is at least (shift - mean)² / n, so the difference of the two sums cannot cancel further than that.

Backward is in :mod:`.soft_split_linear_backward`.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import Launch, chip_of, precision
from .lay_windows import Windows
from .windows import GROW_WITH_THE_BATCH, load_patches, load_shifts, locate_windows


class Statistics(NamedTuple):
    """Mean and 1/sqrt(variance + eps) of every window (B, L)."""

    mean: Tensor
    rstd: Tensor


@triton.jit
def load_weight(weight_ptr, outs, features, weight_stride, out_features):
    """A tile (features, outs) of a packed weight."""
    mask = (outs < out_features)[None, :]
    return tl.load(weight_ptr + outs[None, :] * weight_stride + features[:, None], mask=mask, other=0.0)


@triton.jit
def _store_tokens(
    tokens_ptr, products, scale, offset_ptr, offs_token, offs_out, num_tokens, out_features, HAS_OFFSET: tl.constexpr
):
    """scale products + offset, a tile (tokens, outs)."""
    products *= scale[:, None]
    mask_out = offs_out < out_features
    if HAS_OFFSET:
        products += tl.load(offset_ptr + offs_out, mask=mask_out, other=0.0).to(products.dtype)[None, :]
    offs = offs_token.to(tl.int64)[:, None] * out_features + offs_out[None, :]
    mask = (offs_token < num_tokens)[:, None] & mask_out[None, :]
    tl.store(tokens_ptr + offs, products.to(tokens_ptr.dtype.element_ty), mask=mask)


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
    WIDE: tl.constexpr,
    NUM_VALUES: tl.constexpr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    MASKED: tl.constexpr,
    MARKED: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    KEEP_STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPILED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    operand: tl.constexpr = weight_ptr.dtype.element_ty
    accumulator: tl.constexpr = tl.float64 if operand == tl.float64 else tl.float32
    # A shifted float16 value may lie beyond float16; half of it cannot.
    SCALE: tl.constexpr = 0.5 if operand == tl.float16 and NORM else 1.0
    offs_token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    offs_out = tl.program_id(1) * (BLOCK_OUT + BLOCK_REST) + tl.arange(0, BLOCK_OUT)
    window_ptrs, top, left = locate_windows(image_ptr, offs_token, num_tokens, view, WINDOW)
    products = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), accumulator)
    if BLOCK_REST > 0:
        offs_rest = tl.program_id(1) * (BLOCK_OUT + BLOCK_REST) + BLOCK_OUT + tl.arange(0, BLOCK_REST)
        rest = tl.zeros((BLOCK_TOKENS, BLOCK_REST), accumulator)
    if NORM:
        shift = load_shifts(window_ptrs, top, left, view, WINDOW, WIDE, accumulator, COMPILED)
        # Summed over the lanes behind the loop.
        sums = tl.zeros((BLOCK_TOKENS, BLOCK_FEATURES), accumulator)
        squares = tl.zeros((BLOCK_TOKENS, BLOCK_FEATURES), accumulator)
    for start in range(0, weight_stride, BLOCK_FEATURES):
        offs_feature = start + tl.arange(0, BLOCK_FEATURES)
        values = load_patches(window_ptrs, top, left, offs_feature, view, WINDOW, MASKED)
        if NORM:
            values = values.to(accumulator) - shift[:, None]
        if MARKED:
            marks = tl.load(weight_ptr + out_features * weight_stride + offs_feature)
            values = tl.where((marks != 0)[None, :], values, 0.0)
        if NORM:
            sums += values
            squares += values * values
            values *= SCALE
        values = values.to(operand)
        weight = load_weight(weight_ptr, offs_out, offs_feature, weight_stride, out_features)
        products = tl.dot(values, weight, products, input_precision=PRECISION, out_dtype=accumulator)
        if BLOCK_REST > 0:
            weight = load_weight(weight_ptr, offs_rest, offs_feature, weight_stride, out_features)
            rest = tl.dot(values, weight, rest, input_precision=PRECISION, out_dtype=accumulator)
    scale = tl.full((BLOCK_TOKENS,), 1.0, accumulator)
    if NORM:
        mean, variance = tl.sum(sums, 1) / NUM_VALUES, tl.sum(squares, 1) / NUM_VALUES
        rstd = 1.0 / tl.sqrt(tl.maximum(variance - mean * mean, 0.0) + EPS)
        scale = rstd / SCALE
        if KEEP_STATISTICS:
            if tl.program_id(1) == 0:
                mask_token = offs_token < num_tokens
                tl.store(mean_ptr + offs_token, mean + shift, mask=mask_token)
                tl.store(rstd_ptr + offs_token, rstd, mask=mask_token)
    _store_tokens(tokens_ptr, products, scale, offset_ptr, offs_token, offs_out, num_tokens, out_features, HAS_OFFSET)
    if BLOCK_REST > 0:
        _store_tokens(tokens_ptr, rest, scale, offset_ptr, offs_token, offs_rest, num_tokens, out_features, HAS_OFFSET)


def forward_launch(
    windows: Windows,
    weight: Tensor,
    offset: Tensor | None,
    tokens: Tensor,
    statistics: Statistics | None,
    norm: bool,
    eps: float,
) -> Launch:
    """Fill ``tokens`` (B, L, out), contiguous, and ``statistics``, mean and rstd (B, L), if wanted.

    ``weight`` comes from :func:`.lay_windows.pack_weight`; with ``norm`` its rows sum to zero.
    """
    num_tokens, out_features = tokens.shape[0] * tokens.shape[1], tokens.shape[2]
    config = configs.pick(configs.SOFT_SPLIT_LINEAR_FORWARD, tokens.device, weight.dtype, out=out_features)
    mean, rstd = statistics or (None, None)
    grid = (
        triton.cdiv(num_tokens, config.blocks["BLOCK_TOKENS"]),
        triton.cdiv(out_features, config.blocks["BLOCK_OUT"] + config.blocks["BLOCK_REST"]),
    )
    sizes = (num_tokens, out_features, weight.stride(0), windows.view)
    constants = {
        "WINDOW": windows.window,
        "WIDE": windows.blocks_to_a_pixel,
        "NUM_VALUES": windows.num_values,
        "EPS": eps,
        "NORM": norm,
        "MASKED": windows.masked,
        "MARKED": windows.marked,
        "HAS_OFFSET": offset is not None,
        "KEEP_STATISTICS": statistics is not None,
        "PRECISION": precision(weight.dtype),
        "COMPILED": chip_of(tokens.device).arch > 0,
    }
    args = (windows.image, weight, offset, tokens, mean, rstd, *sizes)
    return Launch(_soft_split_linear_forward_kernel, grid, args, constants, config)
