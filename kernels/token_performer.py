"""The Performer token layer's second pass: everything behind the sums over the keys, row by row, in one kernel.

With p the attention weights of a query and A the summary of the keys and values (:mod:`.performer_attention`), and the
LayerNorm's affine folded into fc1::

    y   = v + mask1 (p (A Pᵀ) + b)        z = (y - mean(y)) rstd(y)        h = F1 z + b1
    out = y + mask2 (F2 gelu(h) + b2)

A is projected once per image, so p (A Pᵀ) costs no more than p A. A token is read once and written once; what lies
between stays in registers. Backward reads q, v and the gradient, computes all of that again, and writes dq, the part of
dv that comes by the skip, and its range's share of the weights' gradients.

A mask is a number or zero per token and channel. It is never stored: 16 bits of Philox (Salmon et al., SC 2011), keyed
by a seed and counted by image, token and channel, decide, the same in both directions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import Launch, precision
from .performer_attention import attention_weights, config_of, exponents_of, load_sums, precisions
from .rows import (
    Rows,
    load_matrix,
    load_rows,
    load_vector,
    make_sizes,
    store_matrix,
    store_rows,
    store_vector,
    whole_block,
)


class Layer(NamedTuple):
    """Proj's bias, fc1 with the LayerNorm's affine folded in, fc2: (E,), (hidden, E), (hidden,), (E, hidden), (E,)."""

    proj_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor


class Dropout(NamedTuple):
    """A seed on the device, or None, and of 65536 values how many each of the two masks drops."""

    seed: Tensor | None
    proj: int
    mlp: int


def make_dropout(seed: Tensor | None, proj_drop: float, mlp_drop: float) -> Dropout:
    """Rates in [0, 1), rounded to multiples of 2**-16."""
    return Dropout(seed, *(min(65535, round(65536 * rate)) for rate in (proj_drop, mlp_drop)))


@triton.jit
def _random_bits(seed_ptr, image, tokens, BLOCK_TOKENS: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """32 random bits for each value of a tile (tokens, channels); one draw of Philox makes four."""
    counter = tokens[:, None] * (BLOCK_DIM // 4) + tl.arange(0, BLOCK_DIM // 4)[None, :]
    zero = counter * 0
    a, b, c, d = tl.philox(tl.load(seed_ptr), counter, zero + image, zero, zero)
    return tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (BLOCK_TOKENS, BLOCK_DIM))


@triton.jit
def _drop(values, bits, DROPPED: tl.constexpr):
    """``values`` scaled to keep their expectation, or 0, by the 16 lowest of ``bits``."""
    return tl.where((bits & 0xFFFF) >= DROPPED, values * (65536.0 / (65536 - DROPPED)), 0.0)


@triton.jit
def _normed(y, mask_channel, dim, NORM_EPS: tl.constexpr):
    """z of a tile, zero beyond the last channel, and its rstd."""
    centred = tl.where(mask_channel[None, :], y - (tl.sum(y, 1) / dim)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / dim + NORM_EPS)
    return centred * rstd[:, None], rstd


@triton.jit
def _token_performer_kernel(
    exponents_ptr,
    q_ptr,
    v_ptr,
    w_ptr,
    largest_ptr,
    total_ptr,
    projected_ptr,
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
    FROM_EXPONENTS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    EXPONENT_PRECISION: tl.constexpr,
    MLP_PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    dtype: tl.constexpr = total_ptr.dtype.element_ty
    image, split = tl.program_id(0) // sizes.splits, tl.program_id(0) % sizes.splits
    feature, channel, unit = tl.arange(0, BLOCK_FEATURES), tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_HIDDEN)
    mask_feature, mask_channel = feature < sizes.features, channel < sizes.dim
    largest, total, projected = load_sums(largest_ptr, total_ptr, projected_ptr, image, feature, channel, sizes)
    if not FROM_EXPONENTS:
        w = load_matrix(w_ptr, feature, channel, sizes.features, sizes.dim, dtype)
    proj_bias = load_vector(layer.proj_bias, channel, sizes.dim, dtype)
    fc1 = load_matrix(layer.fc1_weight, unit, channel, hidden, sizes.dim, OPERAND)
    fc1_bias = load_vector(layer.fc1_bias, unit, hidden, dtype)
    fc2 = load_matrix(layer.fc2_weight, channel, unit, sizes.dim, hidden, OPERAND)
    fc2_bias = load_vector(layer.fc2_bias, channel, sizes.dim, dtype)
    first = split * sizes.per_split
    for start in range(first, tl.minimum(first + sizes.per_split, sizes.tokens), BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        if FROM_EXPONENTS:
            row = image.to(tl.int64) * sizes.tokens + token
            mask = (token < sizes.tokens)[:, None] & mask_feature[None, :]
            offs = row[:, None] * sizes.features + feature[None, :]
            exponents = tl.load(exponents_ptr + offs, mask=mask, other=0.0)
        else:
            q = load_rows(q_ptr, image, token, channel, q_rows, sizes, dtype)
            exponents = exponents_of(q, w, EXPONENT_PRECISION)
        weights = attention_weights(exponents, largest, total, mask_feature, sizes.features, EPS)
        y = tl.dot(weights, projected, input_precision=PRECISION, out_dtype=dtype) + proj_bias[None, :]
        if PROJ_DROPPED + MLP_DROPPED > 0:
            bits = _random_bits(seed_ptr, image, token, BLOCK_TOKENS, BLOCK_DIM)
        if PROJ_DROPPED > 0:
            y = _drop(y, bits, PROJ_DROPPED)
        y += load_rows(v_ptr, image, token, channel, v_rows, sizes, dtype)
        z, _ = _normed(y, mask_channel, sizes.dim, NORM_EPS)
        h = tl.dot(z.to(OPERAND), tl.trans(fc1), input_precision=MLP_PRECISION, out_dtype=dtype) + fc1_bias[None, :]
        active = 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
        out = tl.dot(active.to(OPERAND), tl.trans(fc2), input_precision=MLP_PRECISION, out_dtype=dtype)
        out += fc2_bias[None, :]
        if MLP_DROPPED > 0:
            out = _drop(out, bits >> 16, MLP_DROPPED)
        store_rows(out_ptr, y + out, image, token, channel, out_rows, sizes)


@triton.jit
def _token_performer_backward_kernel(
    grad_ptr,
    q_ptr,
    v_ptr,
    w_ptr,
    largest_ptr,
    total_ptr,
    projected_ptr,
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
    """dq and dy, and of one range of tokens what they pass on to S, A Pᵀ and the layer."""
    dtype: tl.constexpr = total_ptr.dtype.element_ty
    image, split = tl.program_id(0) // sizes.splits, tl.program_id(0) % sizes.splits
    feature, channel, unit = tl.arange(0, BLOCK_FEATURES), tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_HIDDEN)
    mask_feature, mask_channel = feature < sizes.features, channel < sizes.dim
    w = load_matrix(w_ptr, feature, channel, sizes.features, sizes.dim, dtype)
    largest, total, projected = load_sums(largest_ptr, total_ptr, projected_ptr, image, feature, channel, sizes)
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
        y = tl.dot(weights, projected, input_precision=PRECISION, out_dtype=dtype) + proj_bias[None, :]
        if PROJ_DROPPED + MLP_DROPPED > 0:
            bits = _random_bits(seed_ptr, image, token, BLOCK_TOKENS, BLOCK_DIM)
        if PROJ_DROPPED > 0:
            y = _drop(y, bits, PROJ_DROPPED)
        y += load_rows(v_ptr, image, token, channel, v_rows, sizes, dtype)
        z, rstd = _normed(y, mask_channel, sizes.dim, NORM_EPS)
        operand = z.to(OPERAND)
        h = tl.dot(operand, tl.trans(fc1), input_precision=MLP_PRECISION, out_dtype=dtype) + fc1_bias[None, :]
        below = 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)

        dy = load_rows(grad_ptr, image, token, channel, grad_rows, sizes, dtype)  # zero beyond the last token
        d_out = dy
        if MLP_DROPPED > 0:
            d_out = _drop(dy, bits >> 16, MLP_DROPPED)
        d_operand = d_out.to(OPERAND)
        dh = tl.dot(d_operand, fc2, input_precision=MLP_PRECISION, out_dtype=dtype)
        dh *= below + h * tl.exp(-0.5 * h * h) * 0.3989422804014327
        active = (h * below).to(OPERAND)
        d_fc2_bias += tl.sum(d_out, 0)
        d_fc2 = tl.dot(tl.trans(d_operand), active, d_fc2, input_precision=MLP_PRECISION, out_dtype=dtype)
        d_fc1_bias += tl.sum(dh, 0)
        d_fc1 = tl.dot(tl.trans(dh.to(OPERAND)), operand, d_fc1, input_precision=MLP_PRECISION, out_dtype=dtype)
        dz = tl.dot(dh.to(OPERAND), fc1, input_precision=MLP_PRECISION, out_dtype=dtype)
        dz -= (tl.sum(dz, 1) / sizes.dim)[:, None] + z * (tl.sum(z * dz, 1) / sizes.dim)[:, None]
        dy += tl.where(mask_channel[None, :], dz * rstd[:, None], 0.0)
        store_rows(dv_ptr, dy, image, token, channel, dv_rows, sizes)
        if PROJ_DROPPED > 0:
            dy = _drop(dy, bits, PROJ_DROPPED)
        d_proj_bias += tl.sum(dy, 0)
        d_weights = tl.dot(dy, tl.trans(projected), input_precision=PRECISION, out_dtype=dtype)
        along = tl.sum(weights * d_weights, 1)
        d_total -= tl.sum(along[:, None] * weights, 0)
        d_exponents = weights * (d_weights - along[:, None] * total[None, :])
        dq = tl.dot(d_exponents, w, input_precision=PRECISION, out_dtype=dtype)
        dq -= q * tl.sum(d_exponents, 1)[:, None]
        d_projected = tl.dot(tl.trans(weights), dy, d_projected, input_precision=PRECISION, out_dtype=dtype)
        store_rows(dq_ptr, dq, image, token, channel, dq_rows, sizes)
    program = tl.program_id(0).to(tl.int64)
    row = program * sizes.features
    store_vector(d_total_ptr + row, d_total, feature, sizes.features)
    store_matrix(d_projected_ptr + row * sizes.dim, d_projected, feature, channel, sizes.features, sizes.dim)
    store_vector(d_layer.proj_bias + program * sizes.dim, d_proj_bias, channel, sizes.dim)
    weight = program * hidden * sizes.dim
    store_matrix(d_layer.fc1_weight + weight, d_fc1, unit, channel, hidden, sizes.dim)
    store_vector(d_layer.fc1_bias + program * hidden, d_fc1_bias, unit, hidden)
    store_matrix(d_layer.fc2_weight + weight, d_fc2, channel, unit, sizes.dim, hidden)
    store_vector(d_layer.fc2_bias + program * sizes.dim, d_fc2_bias, channel, sizes.dim)


def _options(v: Tensor, layer: Layer, dtype: torch.dtype) -> dict[str, object]:
    operand = getattr(tl, str(dtype).removeprefix("torch."))
    hidden = whole_block(layer.fc1_weight.shape[0])
    return {**precisions(v.dtype), "OPERAND": operand, "MLP_PRECISION": precision(dtype), "BLOCK_HIDDEN": hidden}


def forward_launch(
    q: Tensor,
    v: Tensor,
    w: Tensor,
    sums: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    layer: Layer,
    dropout: Dropout,
    dtype: torch.dtype,
    eps: float,
    norm_eps: float,
    splits: int,
    from_exponents: bool = False,
) -> Launch:
    """Fill ``out`` (B, T, E).

    ``sums`` are b (B, m), S (B, m) and A Pᵀ (B, m, E); ``dtype`` is that of the MLP's operands. ``q`` is (B, T, E), or
    with ``from_exponents`` the exponents of its features (B, T, m), contiguous, in the dtype of the sums.
    """
    config = config_of(configs.TOKEN_PERFORMER, v, w.shape[0])
    sizes = make_sizes(v, w.shape[0], splits, config.blocks["BLOCK_TOKENS"])
    queries = (q, None) if from_exponents else (None, q)
    rows = (Rows(*t.stride()) for t in (q, v, out))
    args = (*queries, v, w, *sums, out, layer, dropout.seed, *rows, sizes, layer.fc1_weight.shape[0])
    constants = {
        "PROJ_DROPPED": dropout.proj,
        "MLP_DROPPED": dropout.mlp,
        "EPS": eps,
        "NORM_EPS": norm_eps,
        "FROM_EXPONENTS": from_exponents,
        **_options(v, layer, dtype),
    }
    return Launch(_token_performer_kernel, (v.shape[0] * splits,), args, constants, config)


def backward_launch(
    grad: Tensor,
    q: Tensor,
    v: Tensor,
    w: Tensor,
    sums: tuple[Tensor, Tensor, Tensor],
    layer: Layer,
    dropout: Dropout,
    dq: Tensor,
    dv: Tensor,
    d_sums: tuple[Tensor, Tensor],
    d_layer: Layer,
    dtype: torch.dtype,
    eps: float,
    norm_eps: float,
) -> Launch:
    """Fill dq and the skip's share of dv (B, T, E); and per range (B, splits, ...) dS, d(A Pᵀ), the layer's."""
    config = config_of(configs.TOKEN_PERFORMER_BACKWARD, v, w.shape[0])
    splits = d_sums[0].shape[1]
    sizes = make_sizes(v, w.shape[0], splits, config.blocks["BLOCK_TOKENS"])
    rows = (Rows(*t.stride()) for t in (grad, q, v, dq, dv))
    gradients = (dq, dv, *d_sums, d_layer)
    args = (grad, q, v, w, *sums, layer, dropout.seed, *gradients, *rows, sizes, layer.fc1_weight.shape[0])
    constants = {
        "PROJ_DROPPED": dropout.proj,
        "MLP_DROPPED": dropout.mlp,
        "EPS": eps,
        "NORM_EPS": norm_eps,
        **_options(v, layer, dtype),
    }
    return Launch(_token_performer_backward_kernel, (v.shape[0] * splits,), args, constants, config)
