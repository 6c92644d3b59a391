"""The first pass of a whole Performer stage, for inference: windows to keys, queries and values, and their sums.

A tile of windows is gathered once and multiplied by three weights (:mod:`.soft_split_linear`). Its keys go into the
sums of :mod:`.performer_attention` and are forgotten; of its queries only the exponents of their features are stored,
in float32 or better; its values are stored for the skip. :mod:`.token_performer` does the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..ops.performer.arguments import Sums
from . import configs
from .launch import Launch, precision
from .performer_attention import add_keys, config_of, exponents_of, precisions, store_sums
from .rows import Rows, load_matrix, load_vector, make_sizes, store_rows
from .soft_split_linear import SAMPLES, shift_of, statistics_of
from .windows import View, Window, load_patches


@triton.jit
def _load_weight(weight_ptr, part, channels, features, weight_stride, sizes, num_features):
    """The weight (features, channels) of keys, queries or values: part 0, 1 or 2."""
    row = part * sizes.dim + channels  # 32 bits do for a weight
    mask = (features < num_features)[:, None] & (channels < sizes.dim)[None, :]
    return tl.load(weight_ptr + row[None, :] * weight_stride + features[:, None], mask=mask, other=0.0)


@triton.jit
def _soft_split_performer_kernel(
    image_ptr,
    weight_ptr,
    offset_ptr,
    w_ptr,
    exponents_ptr,
    v_ptr,
    sums,
    weight_stride,
    v_rows,
    view,
    sizes,
    WINDOW: tl.constexpr,
    SAMPLES: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    EXPONENT_PRECISION: tl.constexpr,
    SPLIT_PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WINDOW: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    operand: tl.constexpr = weight_ptr.dtype.element_ty
    dtype: tl.constexpr = sums.total.dtype.element_ty
    # A shifted float16 value may lie beyond float16; half of it cannot.
    SCALE: tl.constexpr = 0.5 if operand == tl.float16 else 1.0
    num_features = WINDOW.channels * WINDOW.kernel_h * WINDOW.kernel_w
    image, split = tl.program_id(0) // sizes.splits, tl.program_id(0) % sizes.splits
    feature, channel = tl.arange(0, BLOCK_FEATURES), tl.arange(0, BLOCK_DIM)
    w = load_matrix(w_ptr, feature, channel, sizes.features, sizes.dim, dtype)
    k_offset = load_vector(offset_ptr, channel, sizes.dim, dtype)
    q_offset = load_vector(offset_ptr + sizes.dim, channel, sizes.dim, dtype)
    v_offset = load_vector(offset_ptr + 2 * sizes.dim, channel, sizes.dim, dtype)
    largest = tl.full((BLOCK_FEATURES,), -1e30, dtype)
    total = tl.zeros((BLOCK_FEATURES,), dtype)
    summary = tl.zeros((BLOCK_FEATURES, BLOCK_DIM), dtype)
    first = split * sizes.per_split
    for start in range(first, tl.minimum(first + sizes.per_split, sizes.tokens), BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        live = token < sizes.tokens
        # Numbered over the batch, as windows are; those beyond this image are beyond all.
        end = (image + 1) * sizes.tokens
        window = tl.where(live, image * sizes.tokens + token, end)
        shift = shift_of(image_ptr, window, end, view, WINDOW, SAMPLES, dtype)
        window_sum = tl.zeros((BLOCK_TOKENS,), dtype)
        squares = tl.zeros((BLOCK_TOKENS,), dtype)
        k = tl.zeros((BLOCK_TOKENS, BLOCK_DIM), dtype)
        q = tl.zeros((BLOCK_TOKENS, BLOCK_DIM), dtype)
        v = tl.zeros((BLOCK_TOKENS, BLOCK_DIM), dtype)
        for begin in range(0, num_features, BLOCK_WINDOW):
            inside = begin + tl.arange(0, BLOCK_WINDOW)
            patches = load_patches(image_ptr, window, inside, end, view, WINDOW)
            shifted = tl.where((inside < num_features)[None, :], patches.to(dtype) - shift[:, None], 0.0)
            window_sum += tl.sum(shifted, 1)
            squares += tl.sum(shifted * shifted, 1)
            values = (shifted * SCALE).to(operand)
            k_weight = _load_weight(weight_ptr, 0, channel, inside, weight_stride, sizes, num_features)
            q_weight = _load_weight(weight_ptr, 1, channel, inside, weight_stride, sizes, num_features)
            v_weight = _load_weight(weight_ptr, 2, channel, inside, weight_stride, sizes, num_features)
            k = tl.dot(values, k_weight, k, input_precision=SPLIT_PRECISION, out_dtype=dtype)
            q = tl.dot(values, q_weight, q, input_precision=SPLIT_PRECISION, out_dtype=dtype)
            v = tl.dot(values, v_weight, v, input_precision=SPLIT_PRECISION, out_dtype=dtype)
        _, rstd = statistics_of(window_sum, squares, num_features, EPS)
        scale = (rstd / SCALE)[:, None]
        # Rounded as they would be in memory.
        k = (k * scale + k_offset[None, :]).to(v_ptr.dtype.element_ty).to(dtype)
        q = (q * scale + q_offset[None, :]).to(v_ptr.dtype.element_ty).to(dtype)
        v = (v * scale + v_offset[None, :]).to(v_ptr.dtype.element_ty).to(dtype)
        store_rows(v_ptr, v, image, token, channel, v_rows, sizes)
        row = image.to(tl.int64) * sizes.tokens + token
        mask = live[:, None] & (feature < sizes.features)[None, :]
        exponents = exponents_of(q, w, EXPONENT_PRECISION)
        tl.store(exponents_ptr + row[:, None] * sizes.features + feature[None, :], exponents, mask=mask)
        exponents = exponents_of(k, w, EXPONENT_PRECISION)
        largest, total, summary = add_keys(exponents, v, live, largest, total, summary, PRECISION)
    store_sums(sums, largest, total, summary, feature, channel, sizes)


def forward_launch(
    image: Tensor,
    weight: Tensor,
    offset: Tensor,
    w: Tensor,
    exponents: Tensor,
    v: Tensor,
    parts: Sums,
    view: View,
    window: Window,
    eps: float,
) -> Launch:
    """Fill the queries' ``exponents`` (B, T, m), ``v`` (B, T, E), and the ``parts`` (B, splits, ...) of the sums.

    ``weight`` (3E, n) comes from :func:`.soft_split_linear.pack_weight`, its rows sum to zero; the rest is contiguous.
    """
    splits = parts.largest.shape[1]
    config = config_of(configs.SOFT_SPLIT_PERFORMER, v, w.shape[0])
    sizes = make_sizes(v, w.shape[0], splits, config.blocks["BLOCK_TOKENS"])
    args = (image, weight, offset, w, exponents, v, parts, weight.stride(0), Rows(*v.stride()), view, sizes)
    constants = {
        "WINDOW": window,
        "SAMPLES": SAMPLES,
        "EPS": eps,
        "SPLIT_PRECISION": precision(weight.dtype),
        **precisions(v.dtype),
    }
    return Launch(_soft_split_performer_kernel, (v.shape[0] * splits,), args, constants, config)
