"""Performer attention with plain matmuls, and the token layer with the projection folded into the attention.

Attention takes half the passes over memory of the literal form. It is linear in its values: ``P (p A) = p (A Pᵀ)`` with
p = phi(q) / D of shape (T, m) and A = Σ phi(k) vᵀ of shape (m, E). Projecting the small A once per image replaces a
matmul over all tokens. The hand-written backward keeps little.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...numerics import compute_dtype, no_autocast, product_dtype
from ..block.aten import affine_for, channels
from ..common.autograd import (
    add_to,
    backward_by_hand,
    differentiable_backward,
    is_exporting,
    may_overwrite,
    wants_hand_written_backward,
)
from ..soft_splits import aten as soft_split
from ..soft_splits.arguments import Split
from . import reference
from .arguments import Layer, Options


def _features(z: Tensor, w: Tensor) -> Tensor:
    """phi(z) with 1/sqrt(m) moved into the exponent: (B, T, E) and (m, E) to (B, T, m)."""
    norm, half_log = torch.linalg.vector_norm(z, dim=-1, keepdim=True), 0.5 * math.log(w.shape[0])
    if may_overwrite():
        return F.linear(z, w).sub_(norm.square().mul_(0.5).add_(half_log)).exp_()
    return (F.linear(z, w) - (0.5 * norm.square() + half_log)).exp()


class Tokens(NamedTuple):
    """Keys, queries and values, or their gradients (B, T, E)."""

    k: Tensor
    q: Tensor
    v: Tensor


def performer_attention(k: Tensor, q: Tensor, v: Tensor, w: Tensor, eps: float) -> Tensor:
    """(B, T, E) each, w (m, E); returns (B, T, E) in the dtype of ``v``."""
    dtype = compute_dtype(k, q, v)
    with no_autocast(v):
        args = (k.to(dtype), q.to(dtype), v.to(dtype), w.to(dtype), eps)
        y = _Attention.apply(*args)[0] if wants_hand_written_backward(k, q, v, w) else _attend(*args)[0]
        return y.to(v.dtype)


def _attention_weights(k: Tensor, q: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """phi(k), and phi(q) divided by the denominator: (B, T, m) each."""
    phi_k, phi_q = _features(k, w), _features(q, w)
    denominator = phi_q @ phi_k.sum(dim=1).unsqueeze(2)
    if is_exporting() and eps > 0:  # optimizers of exported graphs take an addend of 1e-8 for zero
        return phi_k, (phi_q / eps) / (denominator / eps + 1)
    return phi_k, phi_q / (denominator + eps)


def _attend(k: Tensor, q: Tensor, v: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    phi_k, weights = _attention_weights(k, q, w, eps)
    return weights @ (phi_k.transpose(1, 2) @ v), phi_k, weights


class _Attention(torch.autograd.Function):
    """:func:`_attend` with a backward by hand."""

    @staticmethod
    def forward(k: Tensor, q: Tensor, v: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return _attend(k, q, v, w, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        k, q, v, w, ctx.eps = inputs
        _, phi_k, weights = output
        ctx.set_materialize_grads(False)  # no zeros for the outputs that backward keeps
        ctx.mark_non_differentiable(phi_k, weights)
        ctx.save_for_backward(k, q, v, w, phi_k, weights)

    @staticmethod
    @backward_by_hand
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        k, q, v, w, phi_k, weights = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable_backward(lambda *args: _attend(*args)[0], (k, q, v, w, ctx.eps), grad)
        d_weights = grad @ (v.transpose(1, 2) @ phi_k)
        d_phi_k_v = weights.transpose(1, 2) @ grad
        # Rows of a token together, whatever the inputs' strides: they are written through a flat view.
        out = Tokens(*(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (k, q, v)))
        _, _, _, needs_dw, _ = ctx.needs_input_grad
        dw = _attend_backward(d_weights, d_phi_k_v, Tokens(k, q, v), w, phi_k, weights, out, needs_dw)
        return *out, dw, None


def _attend_backward(
    d_weights: Tensor,
    d_phi_k_v: Tensor,
    tokens: Tokens,
    w: Tensor,
    phi_k: Tensor,
    weights: Tensor,
    out: Tokens,
    needs_dw: bool,
) -> Tensor | None:
    """Write the gradients of k, q and v to ``out``, and return that of w.

    They come from those of p = phi(q) / D, ``d_weights``, which is used up, and of A = Σ phi(k) vᵀ, ``d_phi_k_v``. It
    is the gradient of the definition, in which the denominator cancels: with S = Σ phi(k), the exponents get
    ``p (dp - (dp · p) S)`` for q and ``phi(k) (v dAᵀ - Σ (dp · p) p)`` for k.
    """
    k, q, v = tokens
    along = (d_weights * weights).sum(dim=-1, keepdim=True)
    d_exponent_q = d_weights.addcmul_(along, phi_k.sum(dim=1, keepdim=True), value=-1).mul_(weights)
    d_exponent_k = (v @ d_phi_k_v.transpose(1, 2)).sub_(along.transpose(1, 2) @ weights).mul_(phi_k)
    for dz, z, d_exponent in ((out.k, k, d_exponent_k), (out.q, q, d_exponent_q)):
        # z enters as w z - |z|²/2
        torch.mm(d_exponent.flatten(0, 1), w, out=dz.view(-1, dz.shape[2]))
        dz.addcmul_(z, d_exponent.sum(dim=-1, keepdim=True), value=-1)
    torch.bmm(phi_k, d_phi_k_v, out=out.v)
    if not needs_dw:
        return None
    return torch.einsum("btm,bte->me", d_exponent_k, k) + torch.einsum("btm,bte->me", d_exponent_q, q)


class Masks(NamedTuple):
    """Both dropouts' factors (B, T, E), 0 or 1 / (1 - rate); None for no dropout."""

    proj: Tensor | None
    mlp: Tensor | None


def token_performer(kqv: Tensor, layer: Layer, options: Options) -> Tensor:
    """(B, T, 3E) to (B, T, E); see :func:`t2t_fast.ops.token_performer`."""
    if product_dtype(kqv) in (torch.float16, torch.bfloat16) or compute_dtype(kqv, layer.w) != kqv.dtype:
        return reference.token_performer(kqv, layer, options, attention=performer_attention)
    masks = draw_masks(kqv, options)
    if wants_hand_written_backward(kqv, *layer):
        out, *_ = _TokenPerformer.apply(options, kqv, *masks, *layer)
        return out
    out, _ = token_performer_with_masks(kqv, layer, masks, options)
    return out


def draw_masks(kqv: Tensor, options: Options) -> Masks:
    """Random factors for the tokens of ``kqv`` (B, T, 3E)."""
    return Masks(_draw_mask(kqv, options.proj_drop), _draw_mask(kqv, options.mlp_drop))


def _draw_mask(kqv: Tensor, rate: float) -> Tensor | None:
    if rate == 0.0:
        return None
    mask = kqv.new_empty(*kqv.shape[:2], kqv.shape[2] // 3)
    return mask.bernoulli_(1 - rate).div_(1 - rate)


class Kept(NamedTuple):
    """What backward keeps: phi(k), p, y after the first skip, its LayerNorm's statistics, and fc1's output.

    A trace, whose backward is autograd's, has no statistics.
    """

    phi_k: Tensor
    weights: Tensor
    y: Tensor
    mean: Tensor | None
    rstd: Tensor | None
    hidden: Tensor


def token_performer_with_masks(kqv: Tensor, layer: Layer, masks: Masks, options: Options) -> tuple[Tensor, Kept]:
    """The output, and what backward keeps.

    In place only on fresh results of which autograd needs nothing.
    """
    k, q, v = kqv.chunk(3, dim=-1)
    phi_k, weights = _attention_weights(k, q, layer.w, options.eps)
    y = add_to(weights @ (phi_k.transpose(1, 2) @ v @ layer.proj_weight.t()), layer.proj_bias)
    y = add_to(y if masks.proj is None else y * masks.proj, v)
    affine = affine_for(y, layer.norm_weight, layer.norm_bias)
    mean = rstd = None
    if torch.jit.is_tracing():  # nothing is kept, and OpenVINO's converter lacks the other operator
        normed = F.layer_norm(y, channels(y), *affine, options.norm_eps)
    else:
        normed, mean, rstd = torch.native_layer_norm(y, channels(y), *affine, options.norm_eps)
    hidden = F.linear(normed, layer.fc1_weight, layer.fc1_bias)
    out = F.linear(F.gelu(hidden), layer.fc2_weight, layer.fc2_bias)
    out = add_to(out if masks.mlp is None else out * masks.mlp, y)
    return out, Kept(phi_k, weights, y, mean, rstd, hidden)


def _token_performer_flat(
    options: Options, kqv: Tensor, proj_mask: Tensor | None, mlp_mask: Tensor | None, *layer: Any
) -> tuple[Any, ...]:
    """:func:`token_performer_with_masks`, all tensors side by side as autograd takes them."""
    out, kept = token_performer_with_masks(kqv, Layer(*layer), Masks(proj_mask, mlp_mask), options)
    return out, *kept


class _TokenPerformer(torch.autograd.Function):
    """:func:`_token_performer_flat` with the gradient of the definition, by hand."""

    @staticmethod
    def forward(*args: Any) -> tuple[Any, ...]:
        return _token_performer_flat(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options, *tensors = inputs
        _, *kept = output
        ctx.set_materialize_grads(False)  # no zeros for the outputs that backward keeps
        ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(*kept, *tensors)

    @staticmethod
    @backward_by_hand
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Unpacked once: checkpointing insists.
        phi_k, weights, y, mean, rstd, hidden, kqv, proj_mask, mlp_mask, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = (ctx.options, kqv, proj_mask, mlp_mask, *tensors)
            return differentiable_backward(lambda *args: _token_performer_flat(*args)[0], inputs, grad)
        layer = Layer(*tensors)
        _, _, _, _, *needed = ctx.needs_input_grad
        needs: Any = Layer(*needed)
        k, q, v = kqv.chunk(3, dim=-1)

        # Results of one shape are written over each other's buffers as soon as those are used up.
        d_fc2 = grad if mlp_mask is None else grad * mlp_mask
        activated = F.gelu(hidden)
        d_fc2_weight, d_fc2_bias = _outer(d_fc2, activated), d_fc2.sum((0, 1))
        d_hidden = torch.mm(d_fc2.flatten(0, 1), layer.fc2_weight, out=activated.view(-1, activated.shape[2]))
        d_hidden = d_hidden.view_as(hidden)
        torch.ops.aten.gelu_backward.grad_input(d_hidden, hidden, grad_input=d_hidden)
        affine = (layer.norm_weight, layer.norm_bias)
        normed = torch.native_layer_norm(y, y.shape[-1:], *affine, ctx.options.norm_eps)[0]
        d_fc1_weight, d_fc1_bias = _outer(d_hidden, normed), d_hidden.sum((0, 1))
        d_normed = torch.mm(d_hidden.flatten(0, 1), layer.fc1_weight, out=normed.view(-1, normed.shape[2])).view_as(y)
        dy, d_norm_weight, d_norm_bias = torch.ops.aten.native_layer_norm_backward(
            d_normed, y, y.shape[-1:], mean, rstd, *affine, (True, needs.norm_weight, needs.norm_bias)
        )
        dy = dy.add_(grad)
        d_proj = dy if proj_mask is None else torch.mul(dy, proj_mask, out=d_normed)

        phi_k_v = phi_k.transpose(1, 2) @ v
        d_projected = weights.transpose(1, 2) @ d_proj
        d_weights = d_proj @ (phi_k_v @ layer.proj_weight.t()).transpose(1, 2)
        d_kqv = torch.empty_like(kqv, memory_format=torch.contiguous_format)
        out = Tokens(*d_kqv.chunk(3, dim=-1))
        d_phi_k_v = d_projected @ layer.proj_weight
        dw: Any = _attend_backward(d_weights, d_phi_k_v, Tokens(k, q, v), layer.w, phi_k, weights, out, needs.w)
        out.v.add_(dy)
        d_layer = Layer(
            w=dw,
            proj_weight=torch.einsum("bmo,bme->oe", d_projected, phi_k_v),
            proj_bias=d_proj.sum((0, 1)),
            norm_weight=d_norm_weight,
            norm_bias=d_norm_bias,
            fc1_weight=d_fc1_weight,
            fc1_bias=d_fc1_bias,
            fc2_weight=d_fc2_weight,
            fc2_bias=d_fc2_bias,
        )
        return None, d_kqv, None, None, *d_layer


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left.flatten(0, 1).t() @ right.flatten(0, 1)


def soft_split_performer(
    x: Tensor, kqv_weight: Tensor, kqv_bias: Tensor | None, split: Split, layer: Layer, options: Options
) -> Tensor:
    """One after the other, (B, L, E)."""
    return token_performer(soft_split.soft_split_linear(x, kqv_weight, kqv_bias, split), layer, options)
