"""Performer attention with plain matrix products, half the passes over memory of the literal form."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import compute_dtype, no_autocast
from ..ops.common.autograd import (
    backward_by_hand,
    differentiable_backward,
    is_exporting,
    may_overwrite,
    wants_hand_written_backward,
)


def features(z: Tensor, w: Tensor) -> Tensor:
    """phi(z) with 1/sqrt(m) moved into the exponent: (B, T, E) and (m, E) to (B, T, m)."""
    norm, half_log = torch.linalg.vector_norm(z, dim=-1, keepdim=True), 0.5 * math.log(w.shape[0])
    if may_overwrite():
        return F.linear(z, w).sub_(norm.square().mul_(0.5).add_(half_log)).exp_()
    return (F.linear(z, w) - (0.5 * norm.square() + half_log)).exp()


def forward(k: Tensor, q: Tensor, v: Tensor, w: Tensor, eps: float) -> Tensor:
    """(B, T, E) each, w (m, E); returns (B, T, E) in the dtype of ``v``."""
    dtype = compute_dtype(k, q, v)
    with no_autocast(v):
        args = (k.to(dtype), q.to(dtype), v.to(dtype), w.to(dtype), eps)
        y = _Attention.apply(*args)[0] if wants_hand_written_backward(k, q, v, w) else _attend(*args)[0]
        return y.to(v.dtype)


def attention_weights(k: Tensor, q: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """phi(k), and phi(q) divided by the denominator: (B, T, m) each."""
    phi_k, phi_q = features(k, w), features(q, w)
    denominator = phi_q @ phi_k.sum(dim=1).unsqueeze(2)
    if is_exporting() and eps > 0:  # optimizers of exported graphs take an addend of 1e-8 for zero
        return phi_k, (phi_q / eps) / (denominator / eps + 1)
    return phi_k, phi_q / (denominator + eps)


def _attend(k: Tensor, q: Tensor, v: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    phi_k, weights = attention_weights(k, q, w, eps)
    return weights @ (phi_k.transpose(1, 2) @ v), phi_k, weights


class _Attention(torch.autograd.Function):
    """:func:`_attend` with a backward by hand."""

    @staticmethod
    def forward(k: Tensor, q: Tensor, v: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return _attend(k, q, v, w, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, phi_k, weights = output
        ctx.set_materialize_grads(False)  # no zeros for the outputs that backward keeps
        ctx.mark_non_differentiable(phi_k, weights)
        ctx.save_for_backward(*inputs[:4], phi_k, weights)
        ctx.eps = inputs[4]

    @staticmethod
    @backward_by_hand
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        k, q, v, w, phi_k, weights = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable_backward(lambda *args: _attend(*args)[0], (k, q, v, w, ctx.eps), grad)
        d_weights = grad @ (v.transpose(1, 2) @ phi_k)
        d_phi_k_v = weights.transpose(1, 2) @ grad
        # Rows of a token together, whatever the inputs' strides: they are written through a flat view.
        dk, dq, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (k, q, v))
        out = (dk, dq, dv)
        dw = attend_backward(d_weights, d_phi_k_v, k, q, v, w, phi_k, weights, out, ctx.needs_input_grad[3])
        return *out, dw, None


def attend_backward(
    d_weights: Tensor,
    d_phi_k_v: Tensor,
    k: Tensor,
    q: Tensor,
    v: Tensor,
    w: Tensor,
    phi_k: Tensor,
    weights: Tensor,
    out: tuple[Tensor, Tensor, Tensor],
    needs_dw: bool,
) -> Tensor | None:
    """Gradients of (k, q, v), written to ``out``, and of w, from those of p = phi(q) / D and A = Σ phi(k) vᵀ.

    The gradient of :mod:`t2t_fast.reference.performer_attention`, in which the denominator cancels: with
    S = Σ phi(k), the exponents get ``p (dp - (dp · p) S)`` for q and ``phi(k) (v dAᵀ - Σ (dp · p) p)`` for k.
    ``d_weights`` is used up.
    """
    along = (d_weights * weights).sum(dim=-1, keepdim=True)
    d_exponent_q = d_weights.addcmul_(along, phi_k.sum(dim=1, keepdim=True), value=-1).mul_(weights)
    d_exponent_k = (v @ d_phi_k_v.transpose(1, 2)).sub_(along.transpose(1, 2) @ weights).mul_(phi_k)
    for dz, z, d_exponent in ((out[0], k, d_exponent_k), (out[1], q, d_exponent_q)):
        # z enters as w z - |z|²/2
        torch.mm(d_exponent.flatten(0, 1), w, out=dz.view(-1, dz.shape[2]))
        dz.addcmul_(z, d_exponent.sum(dim=-1, keepdim=True), value=-1)
    torch.bmm(phi_k, d_phi_k_v, out=out[2])
    if not needs_dw:
        return None
    return torch.einsum("btm,bte->me", d_exponent_k, k) + torch.einsum("btm,bte->me", d_exponent_q, q)
