"""Softmax attention through ``scaled_dot_product_attention``: the M x N matrix is never stored.

In bfloat16 on a CPU it is two matmuls and a softmax over blocks of scores that stay in the cache, and five matmuls in
backward, where the scores are computed again: there the library's fused kernel is no faster than in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...numerics import no_autocast, product_dtype
from ..common.autograd import (
    backward_by_hand,
    differentiable_backward,
    forward_mode,
    is_transformed,
    wants_gradient,
    wants_hand_written_backward,
)
from . import reference

_BLOCK = 1 << 20  # scores at a time: measured best of 2**18 to 2**22
_FEW = 1 << 15  # scores below which the library's kernel is faster


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float) -> Tensor:
    """Queries (B, heads, M, D), keys and values (B, heads, N, D); returns the shape of the queries."""
    if dropout_p == 0 and _in_blocks(q, k):
        dtype = product_dtype(q)
        with no_autocast(q):
            q, k, v = (t.to(dtype) for t in (q, k, v))
            return _Blocks.apply(q, k, v, scale) if wants_gradient(q, k, v) else _by_blocks(q, k, v, scale)
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)
    if dropout_p == 0 and wants_hand_written_backward(q, k, v):
        return _TwiceDifferentiable.apply(y, q, k, v, scale)
    return y


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """:func:`attention` without dropout, eagerly, for plain tensors of one dtype outside autocast."""
    differentiate = wants_gradient(q, k, v)
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and _are_many(q, k):
        return _Blocks.apply(q, k, v, scale) if differentiate else _by_blocks(q, k, v, scale)
    y = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return _TwiceDifferentiable.apply(y, q, k, v, scale) if differentiate else y


def why_not_attention(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> str | None:
    """None, or why it cannot run."""
    if torch.compiler.is_compiling():
        return None
    if forward_mode():
        return "scaled_dot_product_attention has no forward-mode derivative"
    if torch._C._are_functorch_transforms_active() and wants_gradient(q, k, v):
        return "scaled_dot_product_attention has no second derivative and no batched gradient for torch.func"
    return None


class _TwiceDifferentiable(torch.autograd.Function):
    """The library's result ``y`` as it is; second derivatives, which its kernels lack, are those of the reference."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return grad, None, None, None, None
        return None, *_differentiable_gradients(grad, ctx.scale, *ctx.saved_tensors)


def _differentiable_gradients(grad: Tensor, scale: float, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor | None, ...]:
    """Those of (q, k, v), by the reference, and None for the scale."""
    dq, dk, dv, *_ = differentiable_backward(reference.attention, (q, k, v, scale, 0.0), grad)
    return dq, dk, dv, None


def _in_blocks(q: Tensor, k: Tensor) -> bool:
    if torch.compiler.is_compiling() or is_transformed():
        return False  # the number of blocks must not enter a graph
    return q.device.type == "cpu" and product_dtype(q) == torch.bfloat16 and _are_many(q, k)


def _are_many(q: Tensor, k: Tensor) -> bool:
    batch, heads, queries, _ = q.shape
    return batch * heads * queries * k.shape[2] >= _FEW


def _extent(q: Tensor, k: Tensor) -> tuple[int, int]:
    """Images in a group, and rows of queries in a block."""
    (batch, heads, queries, _), tokens = q.shape, k.shape[2]
    images = max(1, min(batch, _BLOCK // max(1, heads * queries * tokens)))
    return images, max(1, min(queries, _BLOCK // max(1, images * heads * tokens)))


def _empty_like(q: Tensor) -> Tensor:
    """As ``q``, with a token's channels together, as the projections around the attention want them."""
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _by_blocks(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    (batch, heads, tokens, _), (images, rows) = k.shape, _extent(q, k)
    out = _empty_like(q)
    block = [q.new_empty(images * heads, rows, tokens) for _ in range(2)]
    for first in range(0, batch, images):
        q_part, k_part, v_part, out_part = (t[first : first + images] for t in (q, k, v, out))
        keys, values = k_part.flatten(0, 1).transpose(1, 2), v_part.flatten(0, 1)
        for queries, target in zip(q_part.split(rows, 2), out_part.split(rows, 2), strict=True):
            queries = queries.flatten(0, 1)
            scores, weights = (t[: queries.shape[0], : queries.shape[1]] for t in block)
            torch.baddbmm(scores, queries, keys, beta=0, alpha=scale, out=scores)
            torch.softmax(scores, dim=-1, out=weights)
            target.copy_(torch.bmm(weights, values).view_as(target))
    return out


class _Blocks(torch.autograd.Function):
    """:func:`_by_blocks` with a backward by hand, in the same blocks: that of the reference."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out = _by_blocks(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out)
        ctx.scale = scale
        return out

    @staticmethod
    @backward_by_hand
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable_gradients(grad, ctx.scale, q, k, v)
        return *_backward_by_blocks(grad, q, k, v, out, ctx.scale), None


def _backward_by_blocks(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, heads, tokens, _), (images, rows) = k.shape, _extent(q, k)
    dq, dk, dv = (_empty_like(t) for t in (q, k, v))
    block = [q.new_empty(images * heads, rows, tokens) for _ in range(2)]
    for first in range(0, batch, images):
        group = slice(first, first + images)
        keys, values = k[group].flatten(0, 1), v[group].flatten(0, 1)
        d_keys, d_values = (q.new_zeros(keys.shape, dtype=torch.float32) for _ in range(2))
        for start in range(0, q.shape[2], rows):
            queries, d_out, target, result = (t[group, :, start : start + rows] for t in (q, grad, dq, out))
            along = (d_out.float() * result).sum(-1, keepdim=True).flatten(0, 1)  # the mean of dP under P
            queries, d_out = queries.flatten(0, 1), d_out.flatten(0, 1)
            weights, d_scores = (t[: queries.shape[0], : queries.shape[1]] for t in block)
            torch.baddbmm(d_scores, queries, keys.transpose(1, 2), beta=0, alpha=scale, out=d_scores)
            torch.softmax(d_scores, dim=-1, out=weights)
            d_values += torch.bmm(weights.transpose(1, 2), d_out)
            torch.bmm(d_out, values.transpose(1, 2), out=d_scores)
            d_scores.sub_(along.to(q.dtype)).mul_(weights)
            target.copy_(torch.bmm(d_scores, keys).view_as(target)).mul_(scale)
            d_keys += torch.bmm(d_scores.transpose(1, 2), queries)
        dk[group] = d_keys.mul_(scale).view_as(dk[group])
        dv[group] = d_values.view_as(dv[group])
    return dq, dk, dv
