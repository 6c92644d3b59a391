"""The sum of a residual branch and its LayerNorm in one pass over the tokens, forward and backward.

Forward reads x and y once and writes s = x + scale y and gamma z + beta, with z = (s - mean) rstd. The statistics are
those of s as it is stored, in two passes over registers, so nothing cancels. Backward, with e the gradient of s and d
that of the normed tokens::

    ds = e + rstd (gamma d - mean(gamma d) - z mean(z gamma d))     dx = ds     dy = scale ds
    dgamma = Σ d z      dbeta = Σ d         over a fixed number of token ranges, added up in order
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import Launch, block_size_for, chip_of
from .windows import GROW_WITH_THE_BATCH


@triton.jit(do_not_specialize=GROW_WITH_THE_BATCH)
def _add_layer_norm_forward_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    normed_ptr,
    mean_ptr,
    rstd_ptr,
    num_tokens,
    tokens_per_image,
    channels,
    EPS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP_STATISTICS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    stored: tl.constexpr = sum_ptr.dtype.element_ty
    accumulator: tl.constexpr = tl.float64 if stored == tl.float64 else tl.float32
    offs_token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    offs_channel = tl.arange(0, BLOCK_CHANNELS)
    mask_token = offs_token < num_tokens
    mask_channel = offs_channel < channels
    mask = mask_token[:, None] & mask_channel[None, :]
    offs = offs_token.to(tl.int64)[:, None] * channels + offs_channel[None, :]
    branch = tl.load(y_ptr + offs, mask=mask, other=0.0).to(accumulator)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + offs_token // tokens_per_image, mask=mask_token, other=0.0)
        branch *= scale.to(accumulator)[:, None]
    total = (tl.load(x_ptr + offs, mask=mask, other=0.0).to(accumulator) + branch).to(stored)
    tl.store(sum_ptr + offs, total, mask=mask)
    total = total.to(accumulator)
    mean = tl.sum(total, 1) / channels
    centred = tl.where(mask_channel[None, :], total - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / channels + EPS)
    normed = centred * rstd[:, None]
    if HAS_WEIGHT:
        normed *= tl.load(weight_ptr + offs_channel, mask=mask_channel, other=0.0).to(accumulator)[None, :]
    if HAS_BIAS:
        normed += tl.load(bias_ptr + offs_channel, mask=mask_channel, other=0.0).to(accumulator)[None, :]
    tl.store(normed_ptr + offs, normed.to(normed_ptr.dtype.element_ty), mask=mask)
    if KEEP_STATISTICS:
        tl.store(mean_ptr + offs_token, mean, mask=mask_token)
        tl.store(rstd_ptr + offs_token, rstd, mask=mask_token)


@triton.jit(do_not_specialize=GROW_WITH_THE_BATCH)
def _add_layer_norm_backward_kernel(
    d_sum_ptr,
    d_normed_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    scale_ptr,
    weight_ptr,
    dx_ptr,
    dy_ptr,
    d_weight_ptr,
    d_bias_ptr,
    num_tokens,
    tokens_per_split,
    tokens_per_image,
    channels,
    HAS_SUM: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP_DY: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    accumulator: tl.constexpr = mean_ptr.dtype.element_ty
    offs_channel = tl.arange(0, BLOCK_CHANNELS)
    mask_channel = offs_channel < channels
    d_weight = tl.zeros((BLOCK_CHANNELS,), accumulator)
    d_bias = tl.zeros((BLOCK_CHANNELS,), accumulator)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + offs_channel, mask=mask_channel, other=0.0).to(accumulator)
    first = tl.program_id(0) * tokens_per_split
    for start in range(first, tl.minimum(first + tokens_per_split, num_tokens), BLOCK_TOKENS):
        offs_token = start + tl.arange(0, BLOCK_TOKENS)
        mask_token = offs_token < num_tokens
        mask = mask_token[:, None] & mask_channel[None, :]
        offs = offs_token.to(tl.int64)[:, None] * channels + offs_channel[None, :]
        mean = tl.load(mean_ptr + offs_token, mask=mask_token, other=0.0)
        rstd = tl.load(rstd_ptr + offs_token, mask=mask_token, other=0.0)
        total = tl.load(sum_ptr + offs, mask=mask, other=0.0).to(accumulator)
        z = tl.where(mask, (total - mean[:, None]) * rstd[:, None], 0.0)
        dz = tl.load(d_normed_ptr + offs, mask=mask, other=0.0).to(accumulator)
        if HAS_WEIGHT:
            d_weight += tl.sum(dz * z, 0)
        if HAS_BIAS:
            d_bias += tl.sum(dz, 0)
        if HAS_WEIGHT:
            dz *= weight[None, :]
        along = tl.sum(dz * z, 1) / channels
        ds = (dz - (tl.sum(dz, 1) / channels)[:, None] - z * along[:, None]) * rstd[:, None]
        if HAS_SUM:
            ds += tl.load(d_sum_ptr + offs, mask=mask, other=0.0).to(accumulator)
        tl.store(dx_ptr + offs, ds.to(dx_ptr.dtype.element_ty), mask=mask)
        if KEEP_DY:
            if HAS_SCALE:
                scale = tl.load(scale_ptr + offs_token // tokens_per_image, mask=mask_token, other=0.0)
                ds *= scale.to(accumulator)[:, None]
            tl.store(dy_ptr + offs, ds.to(dy_ptr.dtype.element_ty), mask=mask)
    row = tl.program_id(0).to(tl.int64) * channels
    if HAS_WEIGHT:
        tl.store(d_weight_ptr + row + offs_channel, d_weight, mask=mask_channel)
    if HAS_BIAS:
        tl.store(d_bias_ptr + row + offs_channel, d_bias, mask=mask_channel)


def forward_launch(
    x: Tensor,
    y: Tensor,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    total: Tensor,
    normed: Tensor,
    statistics: tuple[Tensor, Tensor] | None,
    eps: float,
) -> Launch:
    """Fill ``total`` and ``normed`` (B, N, C), and ``statistics``, mean and rstd (B, N), if wanted; all contiguous."""
    images, tokens, channels = x.shape
    config = configs.pick(configs.ADD_LAYER_NORM, x.device, total.dtype)
    mean, rstd = statistics or (None, None)
    args = (x, y, scale, weight, bias, total, normed, mean, rstd, images * tokens, tokens, channels)
    constants = {
        "EPS": eps,
        "HAS_SCALE": scale is not None,
        "HAS_WEIGHT": weight is not None,
        "HAS_BIAS": bias is not None,
        "KEEP_STATISTICS": statistics is not None,
        "BLOCK_CHANNELS": block_size_for(channels),
    }
    grid = (triton.cdiv(images * tokens, config.blocks["BLOCK_TOKENS"]),)
    return Launch(_add_layer_norm_forward_kernel, grid, args, constants, config)


def num_splits(total: Tensor) -> int:
    """Into how many token ranges :func:`backward_launch` divides its sums: four for each multiprocessor."""
    block = configs.pick(configs.ADD_LAYER_NORM_BACKWARD, total.device, total.dtype).blocks["BLOCK_TOKENS"]
    return max(1, min(4 * chip_of(total.device).multiprocessors, triton.cdiv(total.shape[0] * total.shape[1], block)))


def backward_launch(
    d_sum: Tensor | None,
    d_normed: Tensor,
    total: Tensor,
    statistics: tuple[Tensor, Tensor],
    scale: Tensor | None,
    weight: Tensor | None,
    dx: Tensor,
    dy: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    splits: int,
) -> Launch:
    """Fill ``dx`` (B, N, C), ``dy`` if wanted, and ``d_weight`` and ``d_bias`` (splits, C), to be summed.

    ``d_weight`` is there whenever ``weight`` is.
    """
    images, tokens, channels = total.shape
    config = configs.pick(configs.ADD_LAYER_NORM_BACKWARD, total.device, total.dtype)
    block = config.blocks["BLOCK_TOKENS"]
    per_split = triton.cdiv(triton.cdiv(images * tokens, splits), block) * block
    args = (d_sum, d_normed, total, *statistics, scale, weight, dx, dy, d_weight, d_bias)
    constants = {
        "HAS_SUM": d_sum is not None,
        "HAS_SCALE": scale is not None,
        "HAS_WEIGHT": weight is not None,
        "HAS_BIAS": d_bias is not None,
        "KEEP_DY": dy is not None,
        "BLOCK_CHANNELS": block_size_for(channels),
    }
    sizes = (images * tokens, per_split, tokens, channels)
    return Launch(_add_layer_norm_backward_kernel, (splits,), (*args, *sizes), constants, config)
