"""Performer attention as ``torch.ops.t2t_fast.performer_attention``, computed in float32 or better in every dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ...numerics import compute_dtype
from ..common import triton as common
from ..common.autograd import differentiable_backward
from . import reference
from .arguments import Sums

# What the kernels hold whole in registers and shared memory.
_LARGEST = 128
_TOO_LARGE = f"w is too large: the kernels take up to {_LARGEST} features and channels"


def performer_attention(k: Tensor, q: Tensor, v: Tensor, w: Tensor, eps: float) -> Tensor:
    """(B, T, E) each, w (m, E); returns (B, T, E) in the dtype of ``v``."""
    return _performer_attention(k, q, v, w, eps)[0]


def why_not_performer_attention(k: Tensor, q: Tensor, v: Tensor, w: Tensor, eps: float) -> str | None:
    """None, or why it cannot run."""
    if {k.dtype, q.dtype} != {v.dtype}:
        return "k, q and v differ in dtype; the kernels take one dtype"
    return why_not_whole(w) or common.why_not(k.dtype, k, q, v, w)


def why_not_whole(w: Tensor) -> str | None:
    """None, or why the kernels cannot hold ``w`` (m, E) whole."""
    return None if max(w.shape) <= _LARGEST else _TOO_LARGE


def why_not_auto_performer_attention(k: Tensor, q: Tensor, v: Tensor, w: Tensor, eps: float) -> str | None:
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
    """y (B, T, E); and the sums over the keys, which backward needs."""
    from ...kernels import performer_attention as kernels

    w, y = w.contiguous(), _like(v)
    sums, _ = sum_keys(k, v, w)
    kernels.query_launch(q, w, sums, y, eps).run(k.device)
    return y, *sums


def sum_keys(k: Tensor, v: Tensor, w: Tensor, proj_weight: Tensor | None = None) -> tuple[Sums, Tensor]:
    """The sums over the keys of each image, ``w`` contiguous; and their summary times proj_weightᵀ, or as it is."""
    from ...kernels import configs
    from ...kernels import performer_attention as kernels
    from ...kernels.rows import num_splits

    parts, sums = empty_sums(v, w, num_splits(k, configs.PERFORMER_ATTENTION)), empty_sums(v, w)
    kernels.summary_launch(k, v, w, parts).run(k.device)
    projected = None
    if proj_weight is not None:
        proj_weight, projected = proj_weight.contiguous(), torch.empty_like(sums.summary)
    kernels.combine_launch(parts, sums, proj_weight, projected, k.dtype).run(k.device)
    return sums, sums.summary if projected is None else projected


def project(sums: Sums, proj_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Their summary times proj_weightᵀ, (B, m, E), as :func:`sum_keys` computes it for tokens of ``dtype``."""
    from ...kernels import performer_attention as kernels

    whole, projected = Sums(*map(torch.empty_like, sums)), torch.empty_like(sums.summary)
    parts = Sums(*(t.unsqueeze(1) for t in sums))  # one range
    kernels.combine_launch(parts, whole, proj_weight.contiguous(), projected, dtype).run(projected.device)
    return projected


def empty_sums(v: Tensor, w: Tensor, *splits: int) -> Sums:
    """Sums to be filled, for each image (B, ...) or range of its tokens (B, splits, ...)."""
    shape, dtype = (v.shape[0], *splits, w.shape[0]), compute_dtype(v)
    largest, total = (v.new_empty(shape, dtype=dtype) for _ in range(2))
    return Sums(largest, total, v.new_empty(*shape, w.shape[1], dtype=dtype))


def _like(t: Tensor) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)


@_performer_attention.register_fake
def _(k: Tensor, q: Tensor, v: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like(v), *empty_sums(v, w)


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
    from ...kernels import configs
    from ...kernels import performer_attention as kernels
    from ...kernels.rows import num_splits

    packed, sums = w.contiguous(), Sums(largest, total, summary)
    dk, dq, dv = _like(k), _like(q), _like(v)
    _, d_total, d_summary = empty_sums(v, w, num_splits(k, configs.PERFORMER_ATTENTION_BACKWARD))
    dw_q = torch.empty_like(d_summary) if needs_dw else None
    kernels.backward_query_launch(grad, q, packed, sums, dq, d_total, d_summary, dw_q, eps).run(k.device)
    d_sums = Sums(largest, d_total.sum(dim=1), d_summary.sum(dim=1))
    splits = num_splits(k, kernels.key_table(needs_dw))
    dw_k = empty_sums(v, w, splits).summary if needs_dw else None
    kernels.backward_key_launch(k, v, packed, d_sums, dk, dv, dw_k, splits).run(k.device)
    if dw_q is None or dw_k is None:
        return dk, dq, dv, largest.new_empty(0)
    return dk, dq, dv, dw_q.sum(dim=(0, 1)) + dw_k.sum(dim=(0, 1))


@_backward.register_fake
def _(
    grad: Tensor, k: Tensor, q: Tensor, v: Tensor, w: Tensor, largest: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, needs_dw = rest
    return _like(k), _like(q), _like(v), largest.new_empty(w.shape if needs_dw else (0,))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    k, q, v, w, ctx.eps = inputs
    _, *sums = output
    ctx.mark_non_differentiable(*sums)
    ctx.save_for_backward(k, q, v, w, *sums)


def _differentiate(ctx: Any, grad: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    k, q, v, w, *sums = ctx.saved_tensors
    _, _, _, needs_dw, _ = ctx.needs_input_grad
    if torch.is_grad_enabled():
        return differentiable_backward(reference.performer_attention, (k, q, v, w, ctx.eps), grad)
    dk, dq, dv, dw = _backward(grad, k, q, v, w, *sums, ctx.eps, needs_dw)
    return dk, dq, dv, dw.to(w.dtype) if needs_dw else None, None


_performer_attention.register_autograd(_differentiate, setup_context=_keep)


@register_flop_formula(torch.ops.t2t_fast.performer_attention)
def _flops(k: Any, q: Any, v: Any, w: Any, *args: Any, **kwargs: Any) -> int:
    return flops(k, w)


def flops(k: Any, w: Any) -> int:
    """phi of keys, phi of queries, the summary and its matmul with the weights, 2 T m E each; and the denominator."""
    batch, tokens, dim = k
    return batch * tokens * w[0] * (8 * dim + 2)


@register_flop_formula(torch.ops.t2t_fast.performer_attention_backward)
def _backward_flops(grad: Any, k: Any, q: Any, v: Any, w: Any, *args: Any, **kwargs: Any) -> int:
    """As a chain of matmuls: two for each of the forward's."""
    return 2 * flops(k, w)
