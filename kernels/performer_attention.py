"""Performer attention in two passes over the tokens, phi never in memory and never out of range.

The first pass sums, per image and feature, over the keys; the second divides, per query::

    e_z     = w z - |z|²/2                      largest = max over the keys of e_k
    total   = Σ exp(e_k - largest)              summary = Σ exp(e_k - largest) vᵀ
    phi     = exp(e_q + largest - top)          top     = max over the features of e_q + largest
    weights = phi / (phi · total + eps m exp(-top))
    y       = weights summary

This is the definition, numerator and denominator divided by exp(top) / m, eps included. No exponential exceeds 1, total
is at least 1, and so is the denominator: the feature that attains top has exp(0) times its total. Hence nothing
overflows, nothing divides by zero, and no ratio loses its digits, whatever the keys and queries. Where exp(-top)
overflows the definition gives less than any float32, and so does this: 0.

Backward recomputes the exponentials, in one pass over the queries (dq, and what total and summary get) and one over the
keys (dk and dv). Sums over tokens go through a fixed number of ranges, added up in order.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.performer.arguments import Sums
from . import configs
from .launch import Config, Launch, block_size_for, precision
from .rows import (
    Rows,
    Sizes,
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


@triton.jit
def exponents_of(z, w, EXPONENT_PRECISION: tl.constexpr):
    """w z - |z|²/2 of a tile, (tokens, features); finite whatever z."""
    if EXPONENT_PRECISION == "tf32x2":
        high = (w.to(tl.int32, bitcast=True) & ~0x1FFF).to(tl.float32, bitcast=True)
        products = tl.dot(z, tl.trans(high), input_precision="tf32")
        products = tl.dot(z, tl.trans(w - high), products, input_precision="tf32")
    else:
        products = tl.dot(z, tl.trans(w), input_precision=EXPONENT_PRECISION, out_dtype=z.dtype)
    exponents = products - (0.5 * tl.sum(z * z, 1))[:, None]
    return tl.where(exponents > -1e30, exponents, -1e30)


@triton.jit
def load_sums(sums, image, features, channels, sizes):
    """Largest, total and summary of one image."""
    dtype: tl.constexpr = sums.total.dtype.element_ty
    row = image.to(tl.int64) * sizes.features
    largest = load_vector(sums.largest + row, features, sizes.features, dtype)
    total = load_vector(sums.total + row, features, sizes.features, dtype)
    summary = load_matrix(sums.summary + row * sizes.dim, features, channels, sizes.features, sizes.dim, dtype)
    return largest, total, summary


@triton.jit
def store_sums(sums, largest, total, summary, features, channels, sizes):
    """Those of this program's range of tokens."""
    row = range_of_tokens() * sizes.features
    store_vector(sums.largest + row, largest, features, sizes.features)
    store_vector(sums.total + row, total, features, sizes.features)
    store_matrix(sums.summary + row * sizes.dim, summary, features, channels, sizes.features, sizes.dim)


@triton.jit
def store_sum_gradients(d_total_ptr, d_summary_ptr, d_total, d_summary, features, channels, sizes):
    """What this program's range of tokens passes on to the total and to the summary."""
    row = range_of_tokens() * sizes.features
    store_vector(d_total_ptr + row, d_total, features, sizes.features)
    store_matrix(d_summary_ptr + row * sizes.dim, d_summary, features, channels, sizes.features, sizes.dim)


@triton.jit
def add_keys(exponents, v, live, largest, total, summary, PRECISION: tl.constexpr):
    """Largest, total and summary with a tile of keys' exponents, (tokens, features), and its values added."""
    risen = tl.maximum(largest, tl.max(tl.where(live[:, None], exponents, -1e30), 0))
    phi = tl.where(live[:, None], tl.exp(exponents - risen[None, :]), 0.0)
    factor = tl.exp(largest - risen)
    total = total * factor + tl.sum(phi, 0)
    summary = tl.dot(tl.trans(phi), v, summary * factor[:, None], input_precision=PRECISION, out_dtype=v.dtype)
    return risen, total, summary


@triton.jit
def attention_weights(exponents, largest, total, mask_feature, num_features, EPS: tl.constexpr):
    """The weights of a tile of queries from their exponents, (tokens, features)."""
    exponents = tl.where(mask_feature[None, :], exponents + largest[None, :], -3e30)
    top = tl.max(exponents, 1)
    phi = tl.exp(exponents - top[:, None])
    denominator = tl.sum(phi * total[None, :], 1)
    if EPS > 0:
        denominator += tl.exp(-top) * EPS * num_features
    return phi / denominator[:, None]


@triton.jit
def query_backward(
    grad, q, weights, w, total, summary, d_total, d_summary, PRECISION: tl.constexpr, dtype: tl.constexpr
):
    """dq of a tile, the gradient of its exponents, and those of total and summary with the tile's share added.

    ``grad`` is the gradient of the tile's y.
    """
    d_weights = tl.dot(grad, tl.trans(summary), input_precision=PRECISION, out_dtype=dtype)
    along = tl.sum(weights * d_weights, 1)
    d_exponents = weights * (d_weights - along[:, None] * total[None, :])
    dq = tl.dot(d_exponents, w, input_precision=PRECISION, out_dtype=dtype)
    dq -= q * tl.sum(d_exponents, 1)[:, None]
    d_total -= tl.sum(along[:, None] * weights, 0)
    d_summary = tl.dot(tl.trans(weights), grad, d_summary, input_precision=PRECISION, out_dtype=dtype)
    return dq, d_exponents, d_total, d_summary


@triton.jit
def _performer_attention_summary_kernel(
    k_ptr,
    v_ptr,
    w_ptr,
    sums,
    k_rows,
    v_rows,
    sizes,
    PRECISION: tl.constexpr,
    EXPONENT_PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """The sums over one range of keys, relative to the range's own largest exponent."""
    dtype: tl.constexpr = sums.total.dtype.element_ty
    image, split = tl.program_id(0), tl.program_id(1)
    feature, channel = tl.arange(0, BLOCK_FEATURES), tl.arange(0, BLOCK_DIM)
    w = load_matrix(w_ptr, feature, channel, sizes.features, sizes.dim, dtype)
    largest = tl.full((BLOCK_FEATURES,), -1e30, dtype)
    total = tl.zeros((BLOCK_FEATURES,), dtype)
    summary = tl.zeros((BLOCK_FEATURES, BLOCK_DIM), dtype)
    first = split * sizes.per_split
    for start in range(first, tl.minimum(first + sizes.per_split, sizes.tokens), BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        k = load_rows(k_ptr, image, token, channel, k_rows, sizes, dtype)
        v = load_rows(v_ptr, image, token, channel, v_rows, sizes, dtype)
        exponents = exponents_of(k, w, EXPONENT_PRECISION)
        largest, total, summary = add_keys(exponents, v, token < sizes.tokens, largest, total, summary, PRECISION)
    store_sums(sums, largest, total, summary, feature, channel, sizes)


@triton.jit(do_not_specialize=["num_parts"])
def _performer_attention_combine_kernel(
    parts,
    sums,
    proj_ptr,
    projected_ptr,
    num_parts,
    sizes,
    PROJECTED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """The sums of an image from those of its ranges, relative to one common largest exponent; and summary projᵀ."""
    dtype: tl.constexpr = sums.total.dtype.element_ty
    image = tl.program_id(0)
    feature, channel = tl.arange(0, BLOCK_FEATURES), tl.arange(0, BLOCK_DIM)
    largest = tl.full((BLOCK_FEATURES,), -1e30, dtype)
    total = tl.zeros((BLOCK_FEATURES,), dtype)
    summary = tl.zeros((BLOCK_FEATURES, BLOCK_DIM), dtype)
    for part in tl.range(0, num_parts, num_stages=3):
        its_largest, its_total, its_summary = load_sums(parts, image * num_parts + part, feature, channel, sizes)
        risen = tl.maximum(largest, its_largest)
        factor, its_factor = tl.exp(largest - risen), tl.exp(its_largest - risen)
        total = total * factor + its_total * its_factor
        summary = summary * factor[:, None] + its_summary * its_factor[:, None]
        largest = risen
    row = image.to(tl.int64) * sizes.features
    store_vector(sums.largest + row, largest, feature, sizes.features)
    store_vector(sums.total + row, total, feature, sizes.features)
    store_matrix(sums.summary + row * sizes.dim, summary, feature, channel, sizes.features, sizes.dim)
    if PROJECTED:
        proj = load_matrix(proj_ptr, channel, channel, sizes.dim, sizes.dim, dtype)
        projected = tl.dot(summary, tl.trans(proj), input_precision=PRECISION, out_dtype=dtype)
        store_matrix(projected_ptr + row * sizes.dim, projected, feature, channel, sizes.features, sizes.dim)


@triton.jit
def _performer_attention_query_kernel(
    q_ptr,
    w_ptr,
    sums,
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
    dtype: tl.constexpr = sums.total.dtype.element_ty
    image, split = tl.program_id(0), tl.program_id(1)
    feature, channel = tl.arange(0, BLOCK_FEATURES), tl.arange(0, BLOCK_DIM)
    mask_feature = feature < sizes.features
    w = load_matrix(w_ptr, feature, channel, sizes.features, sizes.dim, dtype)
    largest, total, summary = load_sums(sums, image, feature, channel, sizes)
    first = split * sizes.per_split
    for start in range(first, tl.minimum(first + sizes.per_split, sizes.tokens), BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        q = load_rows(q_ptr, image, token, channel, q_rows, sizes, dtype)
        exponents = exponents_of(q, w, EXPONENT_PRECISION)
        weights = attention_weights(exponents, largest, total, mask_feature, sizes.features, EPS)
        y = tl.dot(weights, summary, input_precision=PRECISION, out_dtype=dtype)
        store_rows(y_ptr, y, image, token, channel, y_rows, sizes)


@triton.jit
def _performer_attention_backward_query_kernel(
    grad_ptr,
    q_ptr,
    w_ptr,
    sums,
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
    """dq, and what the weights of one range of queries pass on to total, summary and w."""
    dtype: tl.constexpr = sums.total.dtype.element_ty
    image, split = tl.program_id(0), tl.program_id(1)
    feature, channel = tl.arange(0, BLOCK_FEATURES), tl.arange(0, BLOCK_DIM)
    mask_feature = feature < sizes.features
    w = load_matrix(w_ptr, feature, channel, sizes.features, sizes.dim, dtype)
    largest, total, summary = load_sums(sums, image, feature, channel, sizes)
    d_total = tl.zeros((BLOCK_FEATURES,), dtype)
    d_summary = tl.zeros((BLOCK_FEATURES, BLOCK_DIM), dtype)
    dw = tl.zeros((BLOCK_FEATURES, BLOCK_DIM), dtype)
    first = split * sizes.per_split
    for start in range(first, tl.minimum(first + sizes.per_split, sizes.tokens), BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        q = load_rows(q_ptr, image, token, channel, q_rows, sizes, dtype)
        grad = load_rows(grad_ptr, image, token, channel, grad_rows, sizes, dtype)  # zero beyond the last token
        exponents = exponents_of(q, w, EXPONENT_PRECISION)
        weights = attention_weights(exponents, largest, total, mask_feature, sizes.features, EPS)
        dq, d_exponents, d_total, d_summary = query_backward(
            grad, q, weights, w, total, summary, d_total, d_summary, PRECISION, dtype
        )
        store_rows(dq_ptr, dq, image, token, channel, dq_rows, sizes)
        if NEEDS_DW:
            dw = tl.dot(tl.trans(d_exponents), q, dw, input_precision=PRECISION, out_dtype=dtype)
    store_sum_gradients(d_total_ptr, d_summary_ptr, d_total, d_summary, feature, channel, sizes)
    if NEEDS_DW:
        row = range_of_tokens() * sizes.features
        store_matrix(dw_ptr + row * sizes.dim, dw, feature, channel, sizes.features, sizes.dim)


@triton.jit
def _performer_attention_backward_key_kernel(
    k_ptr,
    v_ptr,
    w_ptr,
    d_sums,
    dk_ptr,
    dv_ptr,
    dw_ptr,
    k_rows,
    v_rows,
    dk_rows,
    dv_rows,
    sizes,
    NEEDS_DW: tl.constexpr,
    ADD_TO_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    EXPONENT_PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """dk and dv, and of one range of keys what they pass on to w."""
    dtype: tl.constexpr = d_sums.total.dtype.element_ty
    image, split = tl.program_id(0), tl.program_id(1)
    feature, channel = tl.arange(0, BLOCK_FEATURES), tl.arange(0, BLOCK_DIM)
    mask_feature = feature < sizes.features
    w = load_matrix(w_ptr, feature, channel, sizes.features, sizes.dim, dtype)
    largest, d_total, d_summary = load_sums(d_sums, image, feature, channel, sizes)
    dw = tl.zeros((BLOCK_FEATURES, BLOCK_DIM), dtype)
    first = split * sizes.per_split
    for start in range(first, tl.minimum(first + sizes.per_split, sizes.tokens), BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        k = load_rows(k_ptr, image, token, channel, k_rows, sizes, dtype)
        v = load_rows(v_ptr, image, token, channel, v_rows, sizes, dtype)
        live = (token < sizes.tokens)[:, None] & mask_feature[None, :]
        phi = tl.where(live, tl.exp(exponents_of(k, w, EXPONENT_PRECISION) - largest[None, :]), 0.0)
        d_phi = tl.dot(v, tl.trans(d_summary), input_precision=PRECISION, out_dtype=dtype) + d_total[None, :]
        d_exponents = phi * d_phi
        dk = tl.dot(d_exponents, w, input_precision=PRECISION, out_dtype=dtype)
        dk -= k * tl.sum(d_exponents, 1)[:, None]
        dv = tl.dot(phi, d_summary, input_precision=PRECISION, out_dtype=dtype)
        if ADD_TO_DV:
            dv += load_rows(dv_ptr, image, token, channel, dv_rows, sizes, dtype)
        store_rows(dk_ptr, dk, image, token, channel, dk_rows, sizes)
        store_rows(dv_ptr, dv, image, token, channel, dv_rows, sizes)
        if NEEDS_DW:
            dw = tl.dot(tl.trans(d_exponents), k, dw, input_precision=PRECISION, out_dtype=dtype)
    if NEEDS_DW:
        row = range_of_tokens() * sizes.features
        store_matrix(dw_ptr + row * sizes.dim, dw, feature, channel, sizes.features, sizes.dim)


def config_of(table: configs.Table, k: Tensor, features: int) -> Config:
    config = configs.pick(table, k.device, k.dtype)
    # Whole rows: these blocks are as large as the tensors.
    whole = {"BLOCK_FEATURES": block_size_for(features), "BLOCK_DIM": block_size_for(k.shape[2])}
    return replace(config, blocks={**config.blocks, **whole})


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
    config = config_of(table, k, features)
    sizes = make_sizes(k, features, splits, config.blocks["BLOCK_TOKENS"])
    return Launch(kernel, (k.shape[0], splits), (*args, sizes), {**precisions(k.dtype), **constants}, config)


def precisions(dtype: torch.dtype) -> dict[str, str]:
    """How matmuls with phi, and those in the exponent, are multiplied for rows of ``dtype``."""
    # 16-bit values are exact in TF32; w is in two parts of it, as float32 values are.
    if dtype.itemsize == 2:
        return {"PRECISION": "tf32", "EXPONENT_PRECISION": "tf32x2"}
    dot = precision(dtype)
    return {"PRECISION": dot, "EXPONENT_PRECISION": "tf32x3" if dot == "tf32" else dot}


def summary_launch(k: Tensor, v: Tensor, w: Tensor, parts: Sums) -> Launch:
    """Fill the sums over ranges of tokens, (B, splits, ...), each relative to the range's own largest exponent."""
    args = (k, v, w, parts, Rows(*k.stride()), Rows(*v.stride()))
    splits = parts.largest.shape[1]
    return _launch(_performer_attention_summary_kernel, configs.PERFORMER_ATTENTION, args, k, w.shape[0], splits)


def combine_launch(
    parts: Sums, sums: Sums, proj_weight: Tensor | None, projected: Tensor | None, dtype: torch.dtype
) -> Launch:
    """Fill the ``sums`` of the images (B, ...) from those of their ranges (B, splits, ...).

    And, with ``proj_weight`` (E, E) contiguous, ``projected`` (B, m, E) with the summary times proj_weightᵀ. ``dtype``
    is that of the tokens.
    """
    (images, splits, features), dim = parts.total.shape, parts.summary.shape[3]
    blocks = {"BLOCK_FEATURES": block_size_for(features), "BLOCK_DIM": block_size_for(dim)}
    # As precise as a float32 matmul is: of 16-bit tokens, three products of TF32.
    product = "tf32x3" if dtype.itemsize == 2 else precision(parts.total.dtype)
    constants = {"PROJECTED": proj_weight is not None, "PRECISION": product}
    args = (parts, sums, proj_weight, projected, splits, Sizes(0, 0, dim, features))
    return Launch(_performer_attention_combine_kernel, (images,), args, constants, Config(blocks, 8, 1))


def query_launch(q: Tensor, w: Tensor, sums: Sums, y: Tensor, eps: float) -> Launch:
    """Fill y (B, T, E) from the sums of the images."""
    args, splits = (q, w, sums, y, Rows(*q.stride()), Rows(*y.stride())), num_splits(q, configs.PERFORMER_ATTENTION)
    return _launch(_performer_attention_query_kernel, configs.PERFORMER_ATTENTION, args, q, w.shape[0], splits, EPS=eps)


def backward_query_launch(
    grad: Tensor,
    q: Tensor,
    w: Tensor,
    sums: Sums,
    dq: Tensor,
    d_total: Tensor,
    d_summary: Tensor,
    dw: Tensor | None,
    eps: float,
) -> Launch:
    """Fill dq (B, T, E), and per range ``d_total`` (B, splits, m), ``d_summary`` and dw (B, splits, m, E)."""
    rows = (Rows(*t.stride()) for t in (grad, q, dq))
    args = (grad, q, w, sums, dq, d_total, d_summary, dw, *rows)
    constants = {"EPS": eps, "NEEDS_DW": dw is not None}
    kernel, table = _performer_attention_backward_query_kernel, configs.PERFORMER_ATTENTION_BACKWARD
    return _launch(kernel, table, args, q, w.shape[0], d_total.shape[1], **constants)


def key_table(needs_dw: bool) -> configs.Table:
    """The table of :func:`backward_key_launch`: the sums for w take registers."""
    return configs.PERFORMER_ATTENTION_BACKWARD if needs_dw else configs.PERFORMER_ATTENTION_BACKWARD_KEY


def backward_key_launch(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    d_sums: Sums,
    dk: Tensor,
    dv: Tensor,
    dw: Tensor | None,
    splits: int,
    add_to_dv: bool = False,
) -> Launch:
    """Fill dk and dv (B, T, E), and per range dw (B, splits, m, E).

    ``d_sums`` holds each image's largest exponents and the gradients of its total and its summary. With ``add_to_dv``,
    ``dv`` already holds what the values get elsewhere.
    """
    rows = (Rows(*t.stride()) for t in (k, v, dk, dv))
    args = (k, v, w, d_sums, dk, dv, dw, *rows)
    kernel, table = _performer_attention_backward_key_kernel, key_table(dw is not None)
    constants = {"NEEDS_DW": dw is not None, "ADD_TO_DV": add_to_dv}
    return _launch(kernel, table, args, k, w.shape[0], splits, **constants)
