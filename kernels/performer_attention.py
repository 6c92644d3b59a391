"""Performer attention in two passes over the tokens, phi never in memory and never out of range.

The first pass sums, per image and feature, over the keys; the second divides, per query::

    S = Σ exp(e_k - b)        A = Σ exp(e_k - b) vᵀ        e_z = w z - |z|²/2,   b = max over the keys of e_k
    y = p A,    p = exp(e_q + b - a) / (exp(e_q + b - a) · S + eps m exp(-a)),   a = max over the features of e_q + b

This is the definition, numerator and denominator divided by exp(a) / m, eps included. No exponential exceeds 1, S is at
least 1, and so is the denominator: the feature that attains a has exp(0) times its S. Hence nothing overflows, nothing
divides by zero, and no ratio loses its digits, whatever the keys and queries. Where exp(-a) overflows the definition
gives less than any float32, and so does this: 0.

Backward recomputes the exponentials, in one pass over the queries (dq, and what A and S get) and one over the keys (dk
and dv). Sums over tokens go through a fixed number of ranges, added up in order.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import Config, Launch, chip_of, precision


class Rows(NamedTuple):
    """Strides of a tensor (B, T, E)."""

    image: int
    token: int
    channel: int


class Sizes(NamedTuple):
    """Tokens per image, ranges of tokens and tokens in each, channels, features."""

    tokens: int
    splits: int
    per_split: int
    dim: int
    features: int


@triton.jit
def _load_rows(ptr, image, tokens, channels, rows, sizes, dtype: tl.constexpr):
    """A tile (tokens, channels) of one image as ``dtype``, zeros beyond the tensor."""
    offs = tokens.to(tl.int64)[:, None] * rows.token + (channels.to(tl.int64) * rows.channel)[None, :]
    mask = (tokens < sizes.tokens)[:, None] & (channels < sizes.dim)[None, :]
    return tl.load(ptr + image.to(tl.int64) * rows.image + offs, mask=mask, other=0.0).to(dtype)


@triton.jit
def _store_rows(ptr, values, image, tokens, channels, rows, sizes):
    offs = tokens.to(tl.int64)[:, None] * rows.token + (channels.to(tl.int64) * rows.channel)[None, :]
    mask = (tokens < sizes.tokens)[:, None] & (channels < sizes.dim)[None, :]
    tl.store(ptr + image.to(tl.int64) * rows.image + offs, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_features(w_ptr, features, channels, sizes, dtype: tl.constexpr):
    """w (features, channels), zeros beyond."""
    mask = (features < sizes.features)[:, None] & (channels < sizes.dim)[None, :]
    return tl.load(w_ptr + features[:, None] * sizes.dim + channels[None, :], mask=mask, other=0.0).to(dtype)


@triton.jit
def _exponents(z, w, EXPONENT_PRECISION: tl.constexpr):
    """w z - |z|²/2 of a tile, (tokens, features); finite whatever z."""
    products = tl.dot(z, tl.trans(w), input_precision=EXPONENT_PRECISION, out_dtype=z.dtype)
    exponents = products - (0.5 * tl.sum(z * z, 1))[:, None]
    return tl.where(exponents > -1e30, exponents, -1e30)


@triton.jit
def _attention_weights(
    q, w, largest, total, mask_feature, num_features, EPS: tl.constexpr, EXPONENT_PRECISION: tl.constexpr
):
    """p of a tile of queries, (tokens, features)."""
    exponents = _exponents(q, w, EXPONENT_PRECISION) + largest[None, :]
    exponents = tl.where(mask_feature[None, :], exponents, -3e30)
    top = tl.max(exponents, 1)
    phi = tl.exp(exponents - top[:, None])
    denominator = tl.sum(phi * total[None, :], 1)
    if EPS > 0:
        denominator += tl.exp(-top) * EPS * num_features
    return phi / denominator[:, None]


@triton.jit
def _performer_attention_summary_kernel(
    k_ptr,
    v_ptr,
    w_ptr,
    largest_ptr,
    total_ptr,
    summary_ptr,
    k_rows,
    v_rows,
    sizes,
    PRECISION: tl.constexpr,
    EXPONENT_PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """b, S and A of one range of keys, relative to the range's own b."""
    dtype: tl.constexpr = total_ptr.dtype.element_ty
    image, split = tl.program_id(0) // sizes.splits, tl.program_id(0) % sizes.splits
    feature, channel = tl.arange(0, BLOCK_FEATURES), tl.arange(0, BLOCK_DIM)
    w = _load_features(w_ptr, feature, channel, sizes, dtype)
    largest = tl.full((BLOCK_FEATURES,), -1e30, dtype)
    total = tl.zeros((BLOCK_FEATURES,), dtype)
    summary = tl.zeros((BLOCK_FEATURES, BLOCK_DIM), dtype)
    first = split * sizes.per_split
    for start in range(first, tl.minimum(first + sizes.per_split, sizes.tokens), BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        k = _load_rows(k_ptr, image, token, channel, k_rows, sizes, dtype)
        v = _load_rows(v_ptr, image, token, channel, v_rows, sizes, dtype)
        exponents = _exponents(k, w, EXPONENT_PRECISION)
        live = (token < sizes.tokens)[:, None]
        risen = tl.maximum(largest, tl.max(tl.where(live, exponents, -1e30), 0))
        phi = tl.where(live, tl.exp(exponents - risen[None, :]), 0.0)
        factor = tl.exp(largest - risen)
        total = total * factor + tl.sum(phi, 0)
        summary = summary * factor[:, None]
        summary = tl.dot(tl.trans(phi), v, summary, input_precision=PRECISION, out_dtype=dtype)
        largest = risen
    row = tl.program_id(0).to(tl.int64) * sizes.features + feature
    mask = feature < sizes.features
    tl.store(largest_ptr + row, largest, mask=mask)
    tl.store(total_ptr + row, total, mask=mask)
    mask2 = mask[:, None] & (channel < sizes.dim)[None, :]
    tl.store(summary_ptr + row[:, None] * sizes.dim + channel[None, :], summary, mask=mask2)


@triton.jit
def _performer_attention_query_kernel(
    q_ptr,
    w_ptr,
    largest_ptr,
    total_ptr,
    summary_ptr,
    y_ptr,
    q_rows,
    y_rows,
    sizes,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    EXPONENT_PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    dtype: tl.constexpr = total_ptr.dtype.element_ty
    image, split = tl.program_id(0) // sizes.splits, tl.program_id(0) % sizes.splits
    feature, channel = tl.arange(0, BLOCK_FEATURES), tl.arange(0, BLOCK_DIM)
    mask_feature = feature < sizes.features
    w = _load_features(w_ptr, feature, channel, sizes, dtype)
    row = image.to(tl.int64) * sizes.features + feature
    largest = tl.load(largest_ptr + row, mask=mask_feature, other=0.0)
    total = tl.load(total_ptr + row, mask=mask_feature, other=0.0)
    mask = mask_feature[:, None] & (channel < sizes.dim)[None, :]
    summary = tl.load(summary_ptr + row[:, None] * sizes.dim + channel[None, :], mask=mask, other=0.0)
    first = split * sizes.per_split
    for start in range(first, tl.minimum(first + sizes.per_split, sizes.tokens), BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        q = _load_rows(q_ptr, image, token, channel, q_rows, sizes, dtype)
        weights = _attention_weights(q, w, largest, total, mask_feature, sizes.features, EPS, EXPONENT_PRECISION)
        y = tl.dot(weights, summary, input_precision=PRECISION, out_dtype=dtype)
        _store_rows(y_ptr, y, image, token, channel, y_rows, sizes)


@triton.jit
def _performer_attention_backward_query_kernel(
    grad_ptr,
    q_ptr,
    w_ptr,
    largest_ptr,
    total_ptr,
    summary_ptr,
    dq_ptr,
    d_total_ptr,
    d_summary_ptr,
    dw_ptr,
    grad_rows,
    q_rows,
    dq_rows,
    sizes,
    EPS: tl.constexpr,
    NEEDS_DW: tl.constexpr,
    PRECISION: tl.constexpr,
    EXPONENT_PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """dq, and of one range of queries what they pass on to S, A and w."""
    dtype: tl.constexpr = total_ptr.dtype.element_ty
    image, split = tl.program_id(0) // sizes.splits, tl.program_id(0) % sizes.splits
    feature, channel = tl.arange(0, BLOCK_FEATURES), tl.arange(0, BLOCK_DIM)
    mask_feature = feature < sizes.features
    w = _load_features(w_ptr, feature, channel, sizes, dtype)
    row = image.to(tl.int64) * sizes.features + feature
    largest = tl.load(largest_ptr + row, mask=mask_feature, other=0.0)
    total = tl.load(total_ptr + row, mask=mask_feature, other=0.0)
    mask = mask_feature[:, None] & (channel < sizes.dim)[None, :]
    summary = tl.load(summary_ptr + row[:, None] * sizes.dim + channel[None, :], mask=mask, other=0.0)
    d_total = tl.zeros((BLOCK_FEATURES,), dtype)
    d_summary = tl.zeros((BLOCK_FEATURES, BLOCK_DIM), dtype)
    dw = tl.zeros((BLOCK_FEATURES, BLOCK_DIM), dtype)
    first = split * sizes.per_split
    for start in range(first, tl.minimum(first + sizes.per_split, sizes.tokens), BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        q = _load_rows(q_ptr, image, token, channel, q_rows, sizes, dtype)
        grad = _load_rows(grad_ptr, image, token, channel, grad_rows, sizes, dtype)  # zero beyond the last token
        weights = _attention_weights(q, w, largest, total, mask_feature, sizes.features, EPS, EXPONENT_PRECISION)
        d_weights = tl.dot(grad, tl.trans(summary), input_precision=PRECISION, out_dtype=dtype)
        along = tl.sum(weights * d_weights, 1)
        d_exponents = weights * (d_weights - along[:, None] * total[None, :])
        dq = tl.dot(d_exponents, w, input_precision=PRECISION, out_dtype=dtype)
        dq -= q * tl.sum(d_exponents, 1)[:, None]
        _store_rows(dq_ptr, dq, image, token, channel, dq_rows, sizes)
        d_total -= tl.sum(along[:, None] * weights, 0)
        d_summary = tl.dot(tl.trans(weights), grad, d_summary, input_precision=PRECISION, out_dtype=dtype)
        if NEEDS_DW:
            dw = tl.dot(tl.trans(d_exponents), q, dw, input_precision=PRECISION, out_dtype=dtype)
    row = tl.program_id(0).to(tl.int64) * sizes.features + feature
    offs = row[:, None] * sizes.dim + channel[None, :]
    tl.store(d_total_ptr + row, d_total, mask=mask_feature)
    tl.store(d_summary_ptr + offs, d_summary, mask=mask)
    if NEEDS_DW:
        tl.store(dw_ptr + offs, dw, mask=mask)


@triton.jit
def _performer_attention_backward_key_kernel(
    k_ptr,
    v_ptr,
    w_ptr,
    largest_ptr,
    d_total_ptr,
    d_summary_ptr,
    dk_ptr,
    dv_ptr,
    dw_ptr,
    k_rows,
    v_rows,
    dk_rows,
    dv_rows,
    sizes,
    NEEDS_DW: tl.constexpr,
    PRECISION: tl.constexpr,
    EXPONENT_PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """dk and dv, and of one range of keys what they pass on to w."""
    dtype: tl.constexpr = d_total_ptr.dtype.element_ty
    image, split = tl.program_id(0) // sizes.splits, tl.program_id(0) % sizes.splits
    feature, channel = tl.arange(0, BLOCK_FEATURES), tl.arange(0, BLOCK_DIM)
    mask_feature = feature < sizes.features
    w = _load_features(w_ptr, feature, channel, sizes, dtype)
    row = image.to(tl.int64) * sizes.features + feature
    largest = tl.load(largest_ptr + row, mask=mask_feature, other=0.0)
    d_total = tl.load(d_total_ptr + row, mask=mask_feature, other=0.0)
    mask = mask_feature[:, None] & (channel < sizes.dim)[None, :]
    d_summary = tl.load(d_summary_ptr + row[:, None] * sizes.dim + channel[None, :], mask=mask, other=0.0)
    dw = tl.zeros((BLOCK_FEATURES, BLOCK_DIM), dtype)
    first = split * sizes.per_split
    for start in range(first, tl.minimum(first + sizes.per_split, sizes.tokens), BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        k = _load_rows(k_ptr, image, token, channel, k_rows, sizes, dtype)
        v = _load_rows(v_ptr, image, token, channel, v_rows, sizes, dtype)
        live = (token < sizes.tokens)[:, None] & mask_feature[None, :]
        phi = tl.where(live, tl.exp(_exponents(k, w, EXPONENT_PRECISION) - largest[None, :]), 0.0)
        d_phi = tl.dot(v, tl.trans(d_summary), input_precision=PRECISION, out_dtype=dtype) + d_total[None, :]
        d_exponents = phi * d_phi
        dk = tl.dot(d_exponents, w, input_precision=PRECISION, out_dtype=dtype)
        dk -= k * tl.sum(d_exponents, 1)[:, None]
        dv = tl.dot(phi, d_summary, input_precision=PRECISION, out_dtype=dtype)
        _store_rows(dk_ptr, dk, image, token, channel, dk_rows, sizes)
        _store_rows(dv_ptr, dv, image, token, channel, dv_rows, sizes)
        if NEEDS_DW:
            dw = tl.dot(tl.trans(d_exponents), k, dw, input_precision=PRECISION, out_dtype=dtype)
    if NEEDS_DW:
        row = tl.program_id(0).to(tl.int64) * sizes.features + feature
        tl.store(dw_ptr + row[:, None] * sizes.dim + channel[None, :], dw, mask=mask)


def num_splits(k: Tensor) -> int:
    """Into how many ranges the tokens of an image are divided: enough to fill the chip twice, none below a block."""
    block = configs.pick(configs.PERFORMER_ATTENTION, k.device, k.dtype).blocks["BLOCK_TOKENS"]
    wanted = triton.cdiv(2 * chip_of(k.device).multiprocessors, max(1, k.shape[0]))
    return max(1, min(wanted, triton.cdiv(k.shape[1], block)))


def _config(table: configs.Table, k: Tensor, features: int) -> Config:
    config = configs.pick(table, k.device, k.dtype)
    # Whole rows: these blocks are as large as the tensors.
    whole = {"BLOCK_FEATURES": max(16, triton.next_power_of_2(features))}
    whole["BLOCK_DIM"] = max(16, triton.next_power_of_2(k.shape[2]))
    return Config({**config.blocks, **whole}, config.num_warps, config.num_stages, config.tuned)


def _launch(
    kernel: object,
    table: configs.Table,
    args: tuple[object, ...],
    k: Tensor,
    features: int,
    splits: int,
    **constants: object,
) -> Launch:
    """One program per image and range of tokens; ``k`` stands for all tensors of its shape."""
    batch, tokens, dim = k.shape
    config = _config(table, k, features)
    block = config.blocks["BLOCK_TOKENS"]
    sizes = Sizes(tokens, splits, triton.cdiv(triton.cdiv(tokens, splits), block) * block, dim, features)
    # Products of 16-bit values lose nothing in TF32; the exponent's second factor is w, which would.
    dot = "tf32" if k.dtype.itemsize == 2 else precision(k.dtype)
    precisions = {"PRECISION": dot, "EXPONENT_PRECISION": "tf32x3" if dot == "tf32" else dot}
    return Launch(kernel, (batch * splits,), (*args, sizes), {**precisions, **constants}, config)


def summary_launch(k: Tensor, v: Tensor, w: Tensor, largest: Tensor, total: Tensor, summary: Tensor) -> Launch:
    """Fill b (B, splits, m), S (B, splits, m) and A (B, splits, m, E), each range's relative to its own b."""
    args = (k, v, w, largest, total, summary, Rows(*k.stride()), Rows(*v.stride()))
    return _launch(
        _performer_attention_summary_kernel, configs.PERFORMER_ATTENTION, args, k, w.shape[0], largest.shape[1]
    )


def query_launch(
    q: Tensor, w: Tensor, largest: Tensor, total: Tensor, summary: Tensor, y: Tensor, eps: float, splits: int
) -> Launch:
    """Fill y (B, T, E) from b (B, m), S (B, m) and A (B, m, E)."""
    args = (q, w, largest, total, summary, y, Rows(*q.stride()), Rows(*y.stride()))
    return _launch(_performer_attention_query_kernel, configs.PERFORMER_ATTENTION, args, q, w.shape[0], splits, EPS=eps)


def backward_query_launch(
    grad: Tensor,
    q: Tensor,
    w: Tensor,
    largest: Tensor,
    total: Tensor,
    summary: Tensor,
    dq: Tensor,
    d_total: Tensor,
    d_summary: Tensor,
    dw: Tensor | None,
    eps: float,
) -> Launch:
    """Fill dq (B, T, E), and per range dS (B, splits, m), dA and dw (B, splits, m, E)."""
    rows = (Rows(*t.stride()) for t in (grad, q, dq))
    args = (grad, q, w, largest, total, summary, dq, d_total, d_summary, dw, *rows)
    constants = {"EPS": eps, "NEEDS_DW": dw is not None}
    kernel, table = _performer_attention_backward_query_kernel, configs.PERFORMER_ATTENTION_BACKWARD
    return _launch(kernel, table, args, q, w.shape[0], d_total.shape[1], **constants)


def backward_key_launch(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    largest: Tensor,
    d_total: Tensor,
    d_summary: Tensor,
    dk: Tensor,
    dv: Tensor,
    dw: Tensor | None,
    splits: int,
) -> Launch:
    """Fill dk and dv (B, T, E), and per range dw (B, splits, m, E), from dS (B, m) and dA (B, m, E)."""
    rows = (Rows(*t.stride()) for t in (k, v, dk, dv))
    args = (k, v, w, largest, d_total, d_summary, dk, dv, dw, *rows)
    kernel, table = _performer_attention_backward_key_kernel, configs.PERFORMER_ATTENTION_BACKWARD
    return _launch(kernel, table, args, k, w.shape[0], splits, NEEDS_DW=dw is not None)
