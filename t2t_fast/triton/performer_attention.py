"""Performer attention as ``torch.ops.t2t_fast.performer_attention``, computed in float32 or better in every dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..numerics import compute_dtype
from ..ops.common import triton as common
from ..ops.common.autograd import differentiable_backward
from ..reference import performer_attention as reference

# What the kernels hold whole in registers and shared memory.
_LARGEST = 128


def forward(k: Tensor, q: Tensor, v: Tensor, w: Tensor, eps: float) -> Tensor:
    """(B, T, E) each, w (m, E); returns (B, T, E) in the dtype of ``v``."""
    return _performer_attention(k, q, v, w, eps)[0]


def why_not(k: Tensor, q: Tensor, v: Tensor, w: Tensor, eps: float) -> str | None:
    """None, or why not."""
    if {k.dtype, q.dtype} != {v.dtype}:
        return f"k, q and v are {k.dtype}, {q.dtype} and {v.dtype}; the kernels take one dtype"
    return too_wide(w) or common.why_not(k.dtype, k, q, v, w)


def too_wide(w: Tensor) -> str | None:
    """None, or why ``w`` (m, E) does not fit the kernels."""
    if max(w.shape) <= _LARGEST:
        return None
    return f"w is {w.shape[0]} x {w.shape[1]}; the kernels take up to {_LARGEST} features and channels"


def why_not_auto(k: Tensor, *rest: Any) -> str | None:
    """None, or why ``auto`` passes it over."""
    return common.why_not_auto(k.dtype, k)


@torch.library.custom_op(
    "t2t_fast::performer_attention",
    mutates_args=(),
    schema="(Tensor k, Tensor q, Tensor v, Tensor w, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _performer_attention(
    k: Tensor, q: Tensor, v: Tensor, w: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (B, T, E); and what backward needs of the keys: b (B, m), S (B, m) and A (B, m, E)."""
    from ..kernels import performer_attention as kernels
    from ..kernels.rows import num_splits

    w, splits, y = w.contiguous(), num_splits(k), torch.empty(v.shape, dtype=v.dtype, device=v.device)
    largest, total, summary = summarize(k, v, w, splits)
    kernels.query_launch(q, w, largest, total, summary, y, eps, splits).run(k.device)
    return y, largest, total, summary


def summarize(k: Tensor, v: Tensor, w: Tensor, splits: int) -> tuple[Tensor, Tensor, Tensor]:
    """b (B, m), S (B, m) and A (B, m, E) of the keys and values, ``w`` contiguous."""
    from ..kernels import performer_attention as kernels

    sums = sums_of(v, w, splits)
    kernels.summary_launch(k, v, w, *sums).run(k.device)
    return combine(*sums)


def combine(largest: Tensor, total: Tensor, summary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sums over all ranges of tokens (B, splits, ...), relative to one common b."""
    top = largest.amax(dim=1)
    factor = torch.exp(largest - top.unsqueeze(1))
    return top, (total * factor).sum(dim=1), (summary * factor.unsqueeze(3)).sum(dim=1)


def sums_of(v: Tensor, w: Tensor, *splits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Empty b (B, m), S (B, m) and A (B, m, E); with ``splits``, (B, splits, ...)."""
    shape, dtype = (v.shape[0], *splits, w.shape[0]), compute_dtype(v)
    largest, total = (v.new_empty(shape, dtype=dtype) for _ in range(2))
    return largest, total, v.new_empty(*shape, w.shape[1], dtype=dtype)


@_performer_attention.register_fake
def _(k: Tensor, q: Tensor, v: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty(v.shape, dtype=v.dtype, device=v.device), *sums_of(v, w)


@torch.library.custom_op(
    "t2t_fast::performer_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor k, Tensor q, Tensor v, Tensor w, Tensor largest, Tensor total, Tensor summary, "
    "float eps, bool needs_dw) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor,
    k: Tensor,
    q: Tensor,
    v: Tensor,
    w: Tensor,
    largest: Tensor,
    total: Tensor,
    summary: Tensor,
    eps: float,
    needs_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, q, v, and of w (m, E) in float32 or better, or empty."""
    from ..kernels import performer_attention as kernels
    from ..kernels.rows import num_splits

    packed, splits = w.contiguous(), num_splits(k)
    dk, dq, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (k, q, v))
    _, d_total, d_summary = sums_of(v, w, splits)
    dw: list[Any] = [torch.empty_like(d_summary) for _ in range(2)] if needs_dw else [None, None]
    sums = (largest, total, summary)
    kernels.backward_query_launch(grad, q, packed, *sums, dq, d_total, d_summary, dw[0], eps).run(k.device)
    d_total, d_summary = d_total.sum(dim=1), d_summary.sum(dim=1)
    kernels.backward_key_launch(k, v, packed, largest, d_total, d_summary, dk, dv, dw[1], splits).run(k.device)
    total_dw: Any = sum(d.sum(dim=(0, 1)) for d in dw) if needs_dw else largest.new_empty(0)
    return dk, dq, dv, total_dw


@_backward.register_fake
def _(grad: Tensor, k: Tensor, q: Tensor, v: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    largest, needs_dw = rest[0], rest[-1]
    dk, dq, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (k, q, v))
    return dk, dq, dv, largest.new_empty(w.shape if needs_dw else (0,))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.eps = inputs[4]


def _differentiate(ctx: Any, grad: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    saved, needs_dw = ctx.saved_tensors, ctx.needs_input_grad[3]
    if torch.is_grad_enabled():
        return differentiable_backward(reference.forward, (*saved[:4], ctx.eps), grad)
    *gradients, dw = _backward(grad, *saved, ctx.eps, needs_dw)
    return *gradients, dw.to(saved[3].dtype) if needs_dw else None, None


_performer_attention.register_autograd(_differentiate, setup_context=_keep)


@register_flop_formula(torch.ops.t2t_fast.performer_attention)
def _flops(k: Any, q: Any, v: Any, w: Any, *args: Any, **kwargs: Any) -> int:
    return flops(k, w)


def flops(k: Any, w: Any) -> int:
    """phi of keys and queries, A and p A at 2 T m E each, and the denominator."""
    batch, tokens, dim = k
    return batch * tokens * w[0] * (8 * dim + 2)


@register_flop_formula(torch.ops.t2t_fast.performer_attention_backward)
def _backward_flops(grad: Any, k: Any, q: Any, v: Any, w: Any, *args: Any, **kwargs: Any) -> int:
    """As a chain of products: two for each of the forward's."""
    return 2 * flops(k, w)
