"""The Performer token layer as ``torch.ops.t2t_fast.token_performer``: two passes over the tokens in each direction.

The LayerNorm's affine is folded into fc1 by plain tensor operations outside, whose gradients autograd takes. Where a
layer does not fit the chip (too wide, or float32 without TF32) or w is to be learned, the attention kernels and library
operations run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..aten.soft_split_linear import fold_norm
from ..aten.token_performer import forward_with_masks
from ..numerics import compute_dtype, no_autocast, product_dtype
from ..ops.common import triton as common
from ..ops.common.autograd import differentiable_backward, wants_gradient
from ..reference import token_performer as reference
from . import performer_attention

# Widths up to which a token's row and all weights stay in registers.
_WIDEST = 64


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
    if not_fused(kqv.device, kqv.dtype, w, fc1_weight, wants_gradient(*tensors)):
        rates = (proj_drop, mlp_drop, eps, norm_eps)
        return reference.forward(*tensors, *rates, attention=performer_attention.forward)
    dtype = product_dtype(kqv)
    with no_autocast(kqv):
        layer = (*fold(norm_weight, norm_bias, fc1_weight, fc1_bias, kqv), fc2_weight, fc2_bias)
        seed = draw_seed(kqv) if proj_drop or mlp_drop else None
        rates = (proj_drop, mlp_drop, eps, norm_eps)
        return _token_performer(kqv, w, proj_weight, proj_bias, *layer, seed, dtype, *rates)[0]


def not_fused(
    device: torch.device, dtype: torch.dtype, w: Tensor, fc1_weight: Tensor, differentiate: bool
) -> str | None:
    """Why the layer's own kernels do not take keys, queries and values of ``dtype``; None if they do."""
    widest = max(*w.shape, *fc1_weight.shape)
    if widest > _WIDEST:
        return f"{widest} channels, features or hidden units are more than the {_WIDEST} that fit"
    if differentiate and w.requires_grad:
        return "w is to be learned"
    if not _has_configs(device, dtype, differentiate):
        return f"the kernels are not built for {'training in ' if differentiate else ''}this precision on this GPU"
    return None


def detail(*args: Any) -> str:
    """Which kernels a call takes."""
    tensors = args[:10]
    reason = not_fused(tensors[0].device, tensors[0].dtype, tensors[1], tensors[6], wants_gradient(*tensors))
    return f"attention kernels, then library operations: {reason}" if reason else "fused"


@torch.compiler.assume_constant_result
def _has_configs(device: torch.device, dtype: torch.dtype, differentiate: bool) -> bool:
    from ..kernels import configs

    tables = (configs.TOKEN_PERFORMER, configs.TOKEN_PERFORMER_BACKWARD)[: 1 + differentiate]
    return all(configs.has_config(table, device, dtype) for table in tables)


def fold(
    norm_weight: Tensor | None, norm_bias: Tensor | None, fc1_weight: Tensor, fc1_bias: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """fc1's weight and bias with the LayerNorm's affine, if it has one, in them, in float32 or better."""
    dtype = compute_dtype(tokens, fc1_weight)
    if norm_weight is None and norm_bias is None:
        return fc1_weight.to(dtype), fc1_bias.to(dtype)
    gamma = fc1_weight.new_ones(()) if norm_weight is None else norm_weight
    return fold_norm(fc1_weight, fc1_bias, gamma, norm_bias, dtype)


def draw_seed(x: Tensor) -> Tensor:
    """A seed of the masks (1,), int64, from torch's generator of ``x``'s device: no synchronisation, new in each
    replay of a CUDA graph, and restored with the generator by checkpointing."""
    return torch.randint(2**63 - 1, (1,), device=x.device)


def why_not(kqv: Tensor, w: Tensor, proj_weight: Tensor, *rest: Any) -> str | None:
    """None, or why not."""
    return cannot_run_layer(kqv, product_dtype(kqv), w, proj_weight, *rest)


def cannot_run_layer(x: Tensor, dtype: torch.dtype, w: Tensor, *rest: Any) -> str | None:
    """Why a layer of these arguments cannot run behind ``x``; None if it can."""
    tensors = (t for t in rest if isinstance(t, Tensor))
    return performer_attention.too_wide(w) or common.why_not(dtype, x, w, *tensors)


def why_not_auto(kqv: Tensor, *rest: Any) -> str | None:
    """None, or why ``auto`` passes it over."""
    return common.why_not_auto(product_dtype(kqv), kqv)


@torch.library.custom_op(
    "t2t_fast::token_performer",
    mutates_args=(),
    schema="(Tensor kqv, Tensor w, Tensor proj_weight, Tensor proj_bias, Tensor fc1_weight, Tensor fc1_bias, "
    "Tensor fc2_weight, Tensor fc2_bias, Tensor? seed, ScalarType dtype, float proj_drop, float mlp_drop, float eps, "
    "float norm_eps) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _token_performer(
    kqv: Tensor,
    w: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    seed: Tensor | None,
    dtype: torch.dtype,
    proj_drop: float,
    mlp_drop: float,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens (B, T, E); and what backward needs of the keys: b (B, m), S (B, m) and A (B, m, E)."""
    from ..kernels import token_performer as kernels
    from ..kernels.rows import num_splits

    k, q, v = kqv.chunk(3, dim=-1)
    w, splits = w.contiguous(), num_splits(k)
    layer = kernels.Layer(*(t.contiguous() for t in (proj_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)))
    largest, total, summary = performer_attention.summarize(k, v, w, splits)
    sums = (largest, total, project(summary, proj_weight))
    out, dropout = _like_values(v), kernels.make_dropout(seed, proj_drop, mlp_drop)
    kernels.forward_launch(q, v, w, sums, out, layer, dropout, dtype, eps, norm_eps, splits).run(v.device)
    return out, largest, total, summary


def project(summary: Tensor, proj_weight: Tensor) -> Tensor:
    """A Pᵀ (B, m, E)."""
    return summary @ proj_weight.to(summary.dtype).t()


def _like_values(v: Tensor) -> Tensor:
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


@_token_performer.register_fake
def _(kqv: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    v = kqv.chunk(3, dim=-1)[2]
    largest, total, summary = performer_attention.sums_of(v, w)
    return _like_values(v), largest, total, summary


@torch.library.custom_op(
    "t2t_fast::token_performer_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor kqv, Tensor w, Tensor proj_weight, Tensor proj_bias, Tensor fc1_weight, "
    "Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, Tensor? seed, Tensor largest, Tensor total, Tensor summary, "
    "ScalarType dtype, float proj_drop, float mlp_drop, float eps, float norm_eps) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor,
    kqv: Tensor,
    w: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    seed: Tensor | None,
    largest: Tensor,
    total: Tensor,
    summary: Tensor,
    dtype: torch.dtype,
    proj_drop: float,
    mlp_drop: float,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, ...]:
    """Gradients of kqv, and in float32 or better of the weights."""
    from ..kernels import performer_attention as attention_kernels
    from ..kernels import token_performer as kernels
    from ..kernels.rows import num_splits

    (k, q, v), w = kqv.chunk(3, dim=-1), w.contiguous()
    splits, device = num_splits(k), kqv.device
    layer = kernels.Layer(*(t.contiguous() for t in (proj_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)))
    d_kqv = torch.empty(kqv.shape, dtype=kqv.dtype, device=device)
    dk, dq, dv = d_kqv.chunk(3, dim=-1)
    _, d_total, d_projected = performer_attention.sums_of(v, w, splits)
    d_layer = kernels.Layer(*(d_total.new_empty(*d_total.shape[:2], *t.shape) for t in layer))
    dropout = kernels.make_dropout(seed, proj_drop, mlp_drop)
    kernels.backward_launch(
        grad,
        q,
        v,
        w,
        (largest, total, project(summary, proj_weight)),
        layer,
        dropout,
        dq,
        dv,
        (d_total, d_projected),
        d_layer,
        dtype,
        eps,
        norm_eps,
    ).run(device)
    d_total, d_projected = d_total.sum(dim=1), d_projected.sum(dim=1)
    d_summary = d_projected @ proj_weight.to(summary.dtype)
    attention_kernels.backward_key_launch(
        k, v, w, largest, d_total, d_summary, dk, dv, None, splits, add_to_dv=True
    ).run(device)
    d_proj_weight = d_projected.flatten(0, 1).t() @ summary.flatten(0, 1)
    return d_kqv, d_proj_weight, *(d.sum(dim=(0, 1)) for d in d_layer)


@_backward.register_fake
def _(
    grad: Tensor,
    kqv: Tensor,
    w: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    weights = (proj_weight, proj_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    d_kqv = torch.empty(kqv.shape, dtype=kqv.dtype, device=kqv.device)
    return d_kqv, *(rest[1].new_empty(t.shape) for t in weights)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:9], *output[1:])
    ctx.rest = inputs[9:]


def _differentiate(ctx: Any, grad: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # unpacked once: checkpointing insists
    if torch.is_grad_enabled():
        *tensors, seed = saved[:9]
        masks, rest = _masks(tensors[0], tensors[1], tensors[4], seed, *ctx.rest), (None,) * 5
        return *differentiable_backward(_definition, (*tensors, *masks, *ctx.rest[3:]), grad)[:8], None, *rest
    d_kqv, *gradients = _backward(grad, *saved, *ctx.rest)
    return d_kqv, None, *(g.to(t.dtype) for g, t in zip(gradients, saved[2:8], strict=True)), *(None,) * 6


def _definition(
    kqv: Tensor,
    w: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *rest: Any,
) -> Tensor:
    """The operator by library operations in float32 or better, given its masks."""
    tensors = (kqv, w, proj_weight, proj_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    same: list[Any] = [t.to(compute_dtype(kqv)) for t in tensors]
    arguments = [*same[:4], None, None, *same[4:], *rest]
    return forward_with_masks(*arguments)[0]


@torch.no_grad()
def _masks(
    kqv: Tensor,
    w: Tensor,
    fc1_weight: Tensor,
    seed: Tensor | None,
    dtype: torch.dtype,
    proj_drop: float,
    mlp_drop: float,
    *eps: float,
) -> tuple[Tensor | None, Tensor | None]:
    """The factors of both dropouts (B, T, E), or None: what the operator makes of a bias of 1 and zeros elsewhere."""
    width, hidden = w.shape[1], fc1_weight.shape[0]
    zero = [fc1_weight.new_zeros(shape) for shape in (width, (hidden, width), hidden, (width, hidden), width)]
    masks: list[Tensor | None] = []
    for place, rate in ((0, proj_drop), (4, mlp_drop)):
        layer = [t + 1 if i == place else t for i, t in enumerate(zero)]
        tensors = (torch.zeros_like(kqv), w, w.new_zeros(width, width), *layer)
        masks.append(_token_performer(*tensors, seed, dtype, proj_drop, mlp_drop, *eps)[0] if rate else None)
    return masks[0], masks[1]


_token_performer.register_autograd(_differentiate, setup_context=_keep)


@register_flop_formula(torch.ops.t2t_fast.token_performer)
def _flops(kqv: Any, w: Any, proj_weight: Any, proj_bias: Any, fc1_weight: Any, *args: Any, **kwargs: Any) -> int:
    """The attention's, and a product with proj, fc1 and fc2 per token as the literal layer has them."""
    batch, tokens, triple = kqv
    return flops((batch, tokens, triple // 3), w, fc1_weight)


def flops(tokens: Any, w: Any, fc1_weight: Any) -> int:
    """Of the layer on tokens (B, T, E)."""
    batch, length, dim = tokens
    return performer_attention.flops(tokens, w) + 2 * batch * length * dim * (dim + 2 * fc1_weight[0])


@register_flop_formula(torch.ops.t2t_fast.token_performer_backward)
def _backward_flops(grad: Any, *args: Any, **kwargs: Any) -> int:
    """As a chain of products: two for each of the forward's."""
    return 2 * _flops(*args)
