"""The Performer token layer with the projection folded into the attention, and a backward that keeps little.

Attention is linear in its values: ``P (p A) = p (A Pᵀ)`` with p = phi(q) / D of shape (T, m) and A = Σ phi(k) vᵀ of
shape (m, E). Projecting the small A once per image replaces a product over all tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import compute_dtype, product_dtype
from ..ops.block.aten import affine_for, channels
from ..ops.common.autograd import add_to, backward_by_hand, differentiable_backward, wants_hand_written_backward
from ..reference import token_performer as reference
from . import performer_attention
from .performer_attention import attend_backward, attention_weights


def forward(
    kqv: Tensor,
    w: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    proj_drop: float,
    mlp_drop: float,
    eps: float,
    norm_eps: float,
) -> Tensor:
    """(B, T, 3E) to (B, T, E); see :func:`t2t_fast.ops.token_performer`."""
    tensors = (kqv, w, proj_weight, proj_bias, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    if product_dtype(kqv) in (torch.float16, torch.bfloat16) or compute_dtype(kqv, w) != kqv.dtype:
        rates = (proj_drop, mlp_drop, eps, norm_eps)
        return reference.forward(*tensors, *rates, attention=performer_attention.forward)
    masks = _dropout_mask(kqv, proj_drop), _dropout_mask(kqv, mlp_drop)
    if wants_hand_written_backward(*tensors):
        return _TokenPerformer.apply(*tensors, *masks, eps, norm_eps)[0]
    return forward_with_masks(*tensors, *masks, eps, norm_eps)[0]


def _dropout_mask(kqv: Tensor, rate: float) -> Tensor | None:
    """(B, T, E) factors, 0 or 1 / (1 - rate); None for no dropout."""
    if rate == 0.0:
        return None
    mask = kqv.new_empty(*kqv.shape[:2], kqv.shape[2] // 3)
    return mask.bernoulli_(1 - rate).div_(1 - rate)


def forward_with_masks(
    kqv: Tensor,
    w: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    proj_mask: Tensor | None,
    mlp_mask: Tensor | None,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, ...]:
    """The output, and what backward keeps: phi(k), p, y after the first skip, its norm's statistics, fc1's output.

    In place only on fresh results of which autograd needs nothing.
    """
    k, q, v = kqv.chunk(3, dim=-1)
    phi_k, weights = attention_weights(k, q, w, eps)
    y = add_to(weights @ (phi_k.transpose(1, 2) @ v @ proj_weight.t()), proj_bias)
    y = add_to(y if proj_mask is None else y * proj_mask, v)
    affine = affine_for(y, norm_weight, norm_bias)
    normed, mean, rstd = torch.native_layer_norm(y, channels(y), *affine, norm_eps)
    hidden = F.linear(normed, fc1_weight, fc1_bias)
    out = F.linear(F.gelu(hidden), fc2_weight, fc2_bias)
    out = add_to(out if mlp_mask is None else out * mlp_mask, y)
    return out, phi_k, weights, y, mean, rstd, hidden


class _TokenPerformer(torch.autograd.Function):
    """:func:`forward_with_masks` with the gradient of :mod:`t2t_fast.reference.token_performer`, by hand."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return forward_with_masks(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)  # no zeros for the outputs that backward keeps
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:12], *output[1:])
        ctx.rest = inputs[12:]

    @staticmethod
    @backward_by_hand
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # unpacked once: checkpointing insists
        inputs, kept = saved[:12], saved[12:]
        if torch.is_grad_enabled():
            return differentiable_backward(lambda *args: forward_with_masks(*args)[0], (*inputs, *ctx.rest), grad)
        kqv, w, proj_weight, _, norm_weight, norm_bias, fc1_weight, _, fc2_weight, _, proj_mask, mlp_mask = inputs
        phi_k, weights, y, mean, rstd, hidden = kept
        k, q, v = kqv.chunk(3, dim=-1)

        # Products of one shape are written over each other's buffers as soon as those are used up.
        d_fc2 = grad if mlp_mask is None else grad * mlp_mask
        activated = F.gelu(hidden)
        d_fc2_weight, d_fc2_bias = _outer(d_fc2, activated), d_fc2.sum((0, 1))
        d_hidden = torch.mm(d_fc2.flatten(0, 1), fc2_weight, out=activated.view(-1, activated.shape[2])).view_as(hidden)
        torch.ops.aten.gelu_backward.grad_input(d_hidden, hidden, grad_input=d_hidden)
        normed = torch.native_layer_norm(y, y.shape[-1:], norm_weight, norm_bias, ctx.rest[1])[0]
        d_fc1_weight, d_fc1_bias = _outer(d_hidden, normed), d_hidden.sum((0, 1))
        d_normed = torch.mm(d_hidden.flatten(0, 1), fc1_weight, out=normed.view(-1, normed.shape[2])).view_as(y)
        dy, d_norm_weight, d_norm_bias = torch.ops.aten.native_layer_norm_backward(
            d_normed, y, y.shape[-1:], mean, rstd, norm_weight, norm_bias, (True, *ctx.needs_input_grad[4:6])
        )
        dy = dy.add_(grad)
        d_proj = dy if proj_mask is None else torch.mul(dy, proj_mask, out=d_normed)

        phi_k_v = phi_k.transpose(1, 2) @ v
        d_projected = weights.transpose(1, 2) @ d_proj
        d_weights = d_proj @ (phi_k_v @ proj_weight.t()).transpose(1, 2)
        d_kqv = torch.empty_like(kqv, memory_format=torch.contiguous_format)
        dk, dq, dv = d_kqv.chunk(3, dim=-1)
        d_phi_k_v = d_projected @ proj_weight
        dw = attend_backward(d_weights, d_phi_k_v, k, q, v, w, phi_k, weights, (dk, dq, dv), ctx.needs_input_grad[1])
        dv.add_(dy)
        return (
            d_kqv,
            dw,
            torch.einsum("bmo,bme->oe", d_projected, phi_k_v),
            d_proj.sum((0, 1)),
            d_norm_weight,
            d_norm_bias,
            d_fc1_weight,
            d_fc1_bias,
            d_fc2_weight,
            d_fc2_bias,
            *(None,) * 4,
        )


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left.flatten(0, 1).t() @ right.flatten(0, 1)
