"""The Performer token layer as ``torch.ops.t2t_fast.token_performer``: two passes over the tokens in each direction.

The LayerNorm's affine is folded into fc1 by plain tensor operations outside, whose gradients autograd takes. Where a
layer does not fit the registers (too wide, or float32 without TF32), the attention kernels and library operations run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..aten.soft_split_linear import fold_norm
from ..numerics import compute_dtype, is_autocast, no_autocast, product_dtype
from ..reference import token_performer as reference
from . import performer_attention
from .availability import cannot_run, no_second_derivative, slower

# Widths up to which a token's row and all weights stay in registers.
_WIDEST = 64


def forward(
    kqv: Tensor,
    w: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
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
    if not is_fused(kqv, w, fc1_weight):
        tensors = (kqv, w, proj_weight, proj_bias, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        rates = (proj_drop, mlp_drop, eps, norm_eps)
        return reference.forward(*tensors, *rates, attention=performer_attention.forward)
    dtype = product_dtype(kqv)
    with no_autocast(kqv):
        layer = (*fold(norm_weight, norm_bias, fc1_weight, fc1_bias, kqv), fc2_weight, fc2_bias)
        seed = draw_seed(kqv) if proj_drop or mlp_drop else None
        rates = (proj_drop, mlp_drop, eps, norm_eps)
        return _token_performer(kqv, w, proj_weight, proj_bias, *layer, seed, dtype, *rates)[0]


def is_fused(kqv: Tensor, w: Tensor, fc1_weight: Tensor) -> bool:
    """Whether the layer's own kernels take it."""
    return max(*w.shape, *fc1_weight.shape) <= _WIDEST and _has_configs(kqv.device, kqv.dtype)


@torch.compiler.assume_constant_result
def _has_configs(device: torch.device, dtype: torch.dtype) -> bool:
    from ..kernels import configs

    tables = (configs.TOKEN_PERFORMER, configs.TOKEN_PERFORMER_BACKWARD)
    return all(configs.has_config(table, device, dtype) for table in tables)


def fold(
    norm_weight: Tensor, norm_bias: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor | None]:
    """fc1's weight and bias with the LayerNorm's affine in them, in float32 or better."""
    dtype = compute_dtype(tokens, fc1_weight)
    return fold_norm(fc1_weight.to(dtype), fc1_bias.to(dtype), norm_weight.to(dtype), norm_bias.to(dtype))


def draw_seed(x: Tensor) -> Tensor:
    """A seed of the masks (1,), int64, from torch's generator of ``x``'s device: no synchronisation, new in each
    replay of a CUDA graph, and restored with the generator by checkpointing."""
    return torch.randint(2**63 - 1, (1,), device=x.device)


def can_run(kqv: Tensor, w: Tensor, proj_weight: Tensor, *rest: Any) -> str | None:
    """None, or why not."""
    if not is_autocast(kqv) and kqv.dtype != proj_weight.dtype:
        return f"kqv is {kqv.dtype}, the weights {proj_weight.dtype}: outside autocast they must agree"
    tensors = (w, proj_weight, *(t for t in rest if isinstance(t, Tensor)))
    return performer_attention.too_wide(w) or cannot_run(product_dtype(kqv), kqv, *tensors)


def is_slower(kqv: Tensor, *rest: Any) -> str | None:
    """None, or why ``auto`` passes it over."""
    return slower(product_dtype(kqv), kqv)


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
    "ScalarType dtype, float proj_drop, float mlp_drop, float eps, float norm_eps, bool needs_dw) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
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
    needs_dw: bool,
) -> tuple[Tensor, ...]:
    """Gradients of kqv, and in float32 or better of w (m, E), or empty, and of the weights."""
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
    dw: list[Any] = [torch.empty_like(d_projected) for _ in range(2)] if needs_dw else [None, None]
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
        dw[0],
        dtype,
        eps,
        norm_eps,
    ).run(device)
    d_total, d_projected = d_total.sum(dim=1), d_projected.sum(dim=1)
    d_summary = d_projected @ proj_weight.to(summary.dtype)
    attention_kernels.backward_key_launch(
        k, v, w, largest, d_total, d_summary, dk, dv, dw[1], splits, add_to_dv=True
    ).run(device)
    total_dw: Any = sum(d.sum(dim=(0, 1)) for d in dw) if needs_dw else largest.new_empty(0)
    d_proj_weight = d_projected.flatten(0, 1).t() @ summary.flatten(0, 1)
    return d_kqv, total_dw, d_proj_weight, *(d.sum(dim=(0, 1)) for d in d_layer)


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
    largest, needs_dw = rest[1], rest[-1]
    weights = (proj_weight, proj_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    d_kqv = torch.empty(kqv.shape, dtype=kqv.dtype, device=kqv.device)
    return d_kqv, largest.new_empty(w.shape if needs_dw else (0,)), *(largest.new_empty(t.shape) for t in weights)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:9], *output[1:])
    ctx.rest = inputs[9:]


def _differentiate(ctx: Any, grad: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    saved, wanted = ctx.saved_tensors, ctx.needs_input_grad  # saved tensors are unpacked once: checkpointing insists
    gradients = _backward(grad, *saved, *ctx.rest, wanted[1])
    return *(g.to(t.dtype) if n else None for g, t, n in zip(gradients, saved, wanted, strict=False)), *(None,) * 6


_token_performer.register_autograd(_differentiate, setup_context=_keep)
no_second_derivative(_backward, "token_performer")


@register_flop_formula(torch.ops.t2t_fast.token_performer)
def _flops(kqv: Any, w: Any, proj_weight: Any, proj_bias: Any, fc1_weight: Any, *args: Any, **kwargs: Any) -> int:
    """The attention's, and a product with proj, fc1 and fc2 per token as the literal layer has them."""
    batch, tokens, triple = kqv
    dim = triple // 3
    attention = performer_attention.flops((batch, tokens, dim), w)
    return attention + 2 * batch * tokens * dim * (dim + 2 * fc1_weight[0])


@register_flop_formula(torch.ops.t2t_fast.token_performer_backward)
def _backward_flops(grad: Any, *args: Any, **kwargs: Any) -> int:
    """As a chain of products: two for each of the forward's."""
    return 2 * _flops(*args)
