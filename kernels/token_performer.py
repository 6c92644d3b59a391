"""The Performer token layer's second pass: everything behind the sums over the keys, row by row, in one kernel.

With the weights and the summary of :mod:`.performer_attention`; P, F1 and F2 the weights of proj, fc1 and fc2, and b,
b1 and b2 their biases; and the LayerNorm's affine folded into fc1::

    y   = v + mask1 (weights (summary Pᵀ) + b)        z = (y - mean(y)) rstd(y)        h = F1 z + b1
    out = y + mask2 (F2 gelu(h) + b2)

The summary is projected once per image, so weights (summary Pᵀ) costs no more than weights summary. A token is read
once and written once; what lies between stays in registers. Backward reads q, v and the gradient, computes all of that
again, and writes dq, the part of dv that comes by the skip, and its range's share of the weights' gradients.

A mask is a number or zero per token and channel. It is never stored: 16 bits of Philox (Salmon et al., SC 2011), keyed
by a seed and counted by image, token and channel, decide, the same in both directions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.performer.arguments import Options, Sums
from . import configs
from .launch import Launch, block_size_for, precision
from .performer_attention import (
    attention_weights,
    config_of,
    exponents_of,
    load_sums,
    precisions,
    query_backward,
    store_sum_gradients,
)
from .rows import (
    Rows,
    load_matrix,
    load_rows,
    load_vector,
    make_sizes,
    num_splits,
    range_of_tokens,
    store_matrix,
    store_rows,
    store_vector,
)

# Of Philox4x32: the fewest that pass every test of its authors (Salmon et al., SC 2011, table 2).
_ROUNDS = tl.constexpr(7)


class FoldedLayer(NamedTuple):
    """Proj's bias, fc1 with the LayerNorm's affine folded in, fc2: (E,), (hidden, E), (hidden,), (E, hidden), (E,)."""

    proj_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor


def num_dropped(rate: float) -> int:
    """How many of 65536 values a dropout of ``rate`` in [0, 1) drops."""
    return min(65535, round(65536 * rate))


@triton.jit
def _random_bits(seed_ptr, image, tokens, BLOCK_TOKENS: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """32 random bits for each value of a tile (tokens, channels); one draw of Philox makes four."""
    counter = tokens[:, None] * (BLOCK_DIM // 4) + tl.arange(0, BLOCK_DIM // 4)[None, :]
    zero = counter * 0
    a, b, c, d = tl.philox(tl.load(seed_ptr), counter, zero + image, zero, zero, n_rounds=_ROUNDS)
    return tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (BLOCK_TOKENS, BLOCK_DIM))


@triton.jit
def _drop(values, bits, DROPPED: tl.constexpr):
    """``values`` scaled to keep their expectation, or 0, by the 16 lowest of ``bits``; or as they are."""
    if DROPPED > 0:
        values = tl.where((bits & 0xFFFF) >= DROPPED, values * (65536.0 / (65536 - DROPPED)), 0.0)
    return values


@triton.jit
def _normed(y, mask_channel, dim, NORM_EPS: tl.constexpr):
    """z of a tile, zero beyond the last channel, and its rstd."""
    centred = tl.where(mask_channel[None, :], y - (tl.sum(y, 1) / dim)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / dim + NORM_EPS)
    return centred * rstd[:, None], rstd


@triton.jit
def _normed_backward(dz, z, rstd, mask_channel, dim):
    dz -= (tl.sum(dz, 1) / dim)[:, None] + z * (tl.sum(z * dz, 1) / dim)[:, None]
    return tl.where(mask_channel[None, :], dz * rstd[:, None], 0.0)


@triton.jit
def _token_performer_kernel(
    q_ptr,
    v_ptr,
    w_ptr,
    sums,
    out_ptr,
    layer,
    seed_ptr,
    q_rows,
    v_rows,
    out_rows,
    sizes,
    hidden,
    PROJ_DROPPED: tl.constexpr,
    MLP_DROPPED: tl.constexpr,
    EPS: tl.constexpr,
    NORM_EPS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    EXPONENT_PRECISION: tl.constexpr,
    MLP_PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    dtype: tl.constexpr = sums.total.dtype.element_ty
    image, split = tl.program_id(0), tl.program_id(1)
    feature, channel, unit = tl.arange(0, BLOCK_FEATURES), tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_HIDDEN)
    mask_feature, mask_channel = feature < sizes.features, channel < sizes.dim
    largest, total, projected = load_sums(sums, image, feature, channel, sizes)
    w = load_matrix(w_ptr, feature, channel, sizes.features, sizes.dim, dtype)
    proj_bias = load_vector(layer.proj_bias, channel, sizes.dim, dtype)
    fc1 = load_matrix(layer.fc1_weight, unit, channel, hidden, sizes.dim, OPERAND)
    fc1_bias = load_vector(layer.fc1_bias, unit, hidden, dtype)
    fc2 = load_matrix(layer.fc2_weight, channel, unit, sizes.dim, hidden, OPERAND)
    fc2_bias = load_vector(layer.fc2_bias, channel, sizes.dim, dtype)
    first = split * sizes.per_split
    for start in range(first, tl.minimum(first + sizes.per_split, sizes.tokens), BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        q = load_rows(q_ptr, image, token, channel, q_rows, sizes, dtype)
        exponents = exponents_of(q, w, EXPONENT_PRECISION)
        weights = attention_weights(exponents, largest, total, mask_feature, sizes.features, EPS)
        bits = token[:, None]  # of no use, unless there is dropout
        if PROJ_DROPPED + MLP_DROPPED > 0:
            bits = _random_bits(seed_ptr, image, token, BLOCK_TOKENS, BLOCK_DIM)
        y = tl.dot(weights, projected, input_precision=PRECISION, out_dtype=dtype) + proj_bias[None, :]
        y = _drop(y, bits, PROJ_DROPPED)
        y += load_rows(v_ptr, image, token, channel, v_rows, sizes, dtype)
        z, _ = _normed(y, mask_channel, sizes.dim, NORM_EPS)
        h = tl.dot(z.to(OPERAND), tl.trans(fc1), input_precision=MLP_PRECISION, out_dtype=dtype) + fc1_bias[None, :]
        active = 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
        out = tl.dot(active.to(OPERAND), tl.trans(fc2), input_precision=MLP_PRECISION, out_dtype=dtype)
        out += fc2_bias[None, :]
        out = _drop(out, bits >> 16, MLP_DROPPED)
        store_rows(out_ptr, y + out, image, token, channel, out_rows, sizes)


@triton.jit
def _mlp_backward(
    d_out,
    z,
    fc1,
    fc1_bias,
    fc2,
    d_fc1,
    d_fc1_bias,
    d_fc2,
    d_fc2_bias,
    dtype: tl.constexpr,
    OPERAND: tl.constexpr,
    MLP_PRECISION: tl.constexpr,
):
    """dz of a tile from the gradient of fc2's output; the tile's share of the MLP's gradients added."""
    operand = z.to(OPERAND)
    h = tl.dot(operand, tl.trans(fc1), input_precision=MLP_PRECISION, out_dtype=dtype) + fc1_bias[None, :]
    below = 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)
    d_operand = d_out.to(OPERAND)
    dh = tl.dot(d_operand, fc2, input_precision=MLP_PRECISION, out_dtype=dtype)
    dh *= below + h * tl.exp(-0.5 * h * h) * 0.3989422804014327
    active = (h * below).to(OPERAND)
    d_fc2_bias += tl.sum(d_out, 0)
    d_fc2 = tl.dot(tl.trans(d_operand), active, d_fc2, input_precision=MLP_PRECISION, out_dtype=dtype)
    d_fc1_bias += tl.sum(dh, 0)
    d_fc1 = tl.dot(tl.trans(dh.to(OPERAND)), operand, d_fc1, input_precision=MLP_PRECISION, out_dtype=dtype)
    dz = tl.dot(dh.to(OPERAND), fc1, input_precision=MLP_PRECISION, out_dtype=dtype)
    return dz, d_fc1, d_fc1_bias, d_fc2, d_fc2_bias


@triton.jit
def _store_layer(layer, proj_bias, fc1, fc1_bias, fc2, fc2_bias, channels, units, dim, hidden):
    """What belongs to this program's range of tokens."""
    program = range_of_tokens()
    weight = program * hidden * dim
    store_vector(layer.proj_bias + program * dim, proj_bias, channels, dim)
    store_matrix(layer.fc1_weight + weight, fc1, units, channels, hidden, dim)
    store_vector(layer.fc1_bias + program * hidden, fc1_bias, units, hidden)
    store_matrix(layer.fc2_weight + weight, fc2, channels, units, dim, hidden)
    store_vector(layer.fc2_bias + program * dim, fc2_bias, channels, dim)


@triton.jit
def _token_performer_backward_kernel(
    grad_ptr,
    q_ptr,
    v_ptr,
    w_ptr,
    sums,
    layer,
    seed_ptr,
    dq_ptr,
    dv_ptr,
    d_total_ptr,
    d_projected_ptr,
    d_layer,
    grad_rows,
    q_rows,
    v_rows,
    dq_rows,
    dv_rows,
    sizes,
    hidden,
    PROJ_DROPPED: tl.constexpr,
    MLP_DROPPED: tl.constexpr,
    EPS: tl.constexpr,
    NORM_EPS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    EXPONENT_PRECISION: tl.constexpr,
    MLP_PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """dq and dy, and what one range of tokens passes on to the total, the projected summary and the layer."""
    dtype: tl.constexpr = sums.total.dtype.element_ty
    image, split = tl.program_id(0), tl.program_id(1)
    feature, channel, unit = tl.arange(0, BLOCK_FEATURES), tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_HIDDEN)
    mask_feature, mask_channel = feature < sizes.features, channel < sizes.dim
    w = load_matrix(w_ptr, feature, channel, sizes.features, sizes.dim, dtype)
    largest, total, projected = load_sums(sums, image, feature, channel, sizes)
    proj_bias = load_vector(layer.proj_bias, channel, sizes.dim, dtype)
    fc1 = load_matrix(layer.fc1_weight, unit, channel, hidden, sizes.dim, OPERAND)
    fc1_bias = load_vector(layer.fc1_bias, unit, hidden, dtype)
    fc2 = load_matrix(layer.fc2_weight, channel, unit, sizes.dim, hidden, OPERAND)
    d_total = tl.zeros((BLOCK_FEATURES,), dtype)
    d_projected = tl.zeros((BLOCK_FEATURES, BLOCK_DIM), dtype)
    d_proj_bias = tl.zeros((BLOCK_DIM,), dtype)
    d_fc1 = tl.zeros((BLOCK_HIDDEN, BLOCK_DIM), dtype)
    d_fc1_bias = tl.zeros((BLOCK_HIDDEN,), dtype)
    d_fc2 = tl.zeros((BLOCK_DIM, BLOCK_HIDDEN), dtype)
    d_fc2_bias = tl.zeros((BLOCK_DIM,), dtype)
    first = split * sizes.per_split
    for start in range(first, tl.minimum(first + sizes.per_split, sizes.tokens), BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        q = load_rows(q_ptr, image, token, channel, q_rows, sizes, dtype)
        exponents = exponents_of(q, w, EXPONENT_PRECISION)
        weights = attention_weights(exponents, largest, total, mask_feature, sizes.features, EPS)
        bits = token[:, None]  # of no use, unless there is dropout
        if PROJ_DROPPED + MLP_DROPPED > 0:
            bits = _random_bits(seed_ptr, image, token, BLOCK_TOKENS, BLOCK_DIM)
        y = tl.dot(weights, projected, input_precision=PRECISION, out_dtype=dtype) + proj_bias[None, :]
        y = _drop(y, bits, PROJ_DROPPED)
        y += load_rows(v_ptr, image, token, channel, v_rows, sizes, dtype)
        z, rstd = _normed(y, mask_channel, sizes.dim, NORM_EPS)
        dy = load_rows(grad_ptr, image, token, channel, grad_rows, sizes, dtype)  # zero beyond the last token
        d_out = _drop(dy, bits >> 16, MLP_DROPPED)
        dz, d_fc1, d_fc1_bias, d_fc2, d_fc2_bias = _mlp_backward(
            d_out, z, fc1, fc1_bias, fc2, d_fc1, d_fc1_bias, d_fc2, d_fc2_bias, dtype, OPERAND, MLP_PRECISION
        )
        dy += _normed_backward(dz, z, rstd, mask_channel, sizes.dim)
        store_rows(dv_ptr, dy, image, token, channel, dv_rows, sizes)
        dy = _drop(dy, bits, PROJ_DROPPED)
        d_proj_bias += tl.sum(dy, 0)
        dq, _, d_total, d_projected = query_backward(
            dy, q, weights, w, total, projected, d_total, d_projected, PRECISION, dtype
        )
        store_rows(dq_ptr, dq, image, token, channel, dq_rows, sizes)
    store_sum_gradients(d_total_ptr, d_projected_ptr, d_total, d_projected, feature, channel, sizes)
    _store_layer(d_layer, d_proj_bias, d_fc1, d_fc1_bias, d_fc2, d_fc2_bias, channel, unit, sizes.dim, hidden)


def _constants(v: Tensor, layer: FoldedLayer, dtype: torch.dtype, options: Options) -> dict[str, object]:
    return {
        **precisions(v.dtype),
        "PROJ_DROPPED": num_dropped(options.proj_drop),
        "MLP_DROPPED": num_dropped(options.mlp_drop),
        "EPS": options.eps,
        "NORM_EPS": options.norm_eps,
        "OPERAND": getattr(tl, str(dtype).removeprefix("torch.")),
        "MLP_PRECISION": precision(dtype),
        "BLOCK_HIDDEN": block_size_for(layer.fc1_weight.shape[0]),
    }


def forward_launch(
    q: Tensor,
    v: Tensor,
    w: Tensor,
    sums: Sums,
    out: Tensor,
    layer: FoldedLayer,
    seed: Tensor | None,
    dtype: torch.dtype,
    options: Options,
) -> Launch:
    """Fill ``out`` (B, T, E).

    ``sums`` are those of the images, the summary projected; ``seed`` is for dropout, on the device; ``dtype`` is
    that of the MLP's operands.
    """
    config, splits = config_of(configs.TOKEN_PERFORMER, v, w.shape[0]), num_splits(v, configs.TOKEN_PERFORMER)
    sizes = make_sizes(v, w.shape[0], splits, config.blocks["BLOCK_TOKENS"])
    rows = (Rows(*t.stride()) for t in (q, v, out))
    args = (q, v, w, sums, out, layer, seed, *rows, sizes, layer.fc1_weight.shape[0])
    constants = _constants(v, layer, dtype, options)
    return Launch(_token_performer_kernel, (v.shape[0], splits), args, constants, config)


def backward_launch(
    grad: Tensor,
    q: Tensor,
    v: Tensor,
    w: Tensor,
    sums: Sums,
    layer: FoldedLayer,
    seed: Tensor | None,
    dq: Tensor,
    dv: Tensor,
    d_total: Tensor,
    d_projected: Tensor,
    d_layer: FoldedLayer,
    dtype: torch.dtype,
    options: Options,
) -> Launch:
    """Fill dq and the skip's share of dv (B, T, E); per range (B, splits, ...) the gradients of the sums and the layer.

    The other arguments are as for :func:`forward_launch`.
    """
    config = config_of(configs.TOKEN_PERFORMER_BACKWARD, v, w.shape[0])
    splits = d_total.shape[1]
    sizes = make_sizes(v, w.shape[0], splits, config.blocks["BLOCK_TOKENS"])
    rows = (Rows(*t.stride()) for t in (grad, q, v, dq, dv))
    gradients = (dq, dv, d_total, d_projected, d_layer)
    args = (grad, q, v, w, sums, layer, seed, *gradients, *rows, sizes, layer.fc1_weight.shape[0])
    constants = _constants(v, layer, dtype, options)
    return Launch(_token_performer_backward_kernel, (v.shape[0], splits), args, constants, config)
