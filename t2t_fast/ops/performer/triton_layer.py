"""``torch.ops.t2t_fast.token_performer``: two passes over the tokens in each direction.

The LayerNorm's affine is folded into fc1 by plain tensor operations outside, whose gradients autograd takes. Where a
layer does not fit the chip (too wide, or float32 without TF32) or w is to be learned, the attention kernels and library
operations run.

``soft_split_performer``, a whole stage, is soft_split_linear and token_performer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ...numerics import compute_dtype, no_autocast, product_dtype
from ..common import triton as common
from ..common.autograd import differentiable_backward, wants_gradient
from ..common.norm import Norm
from ..soft_splits import triton as soft_split
from ..soft_splits.arguments import Split
from ..soft_splits.aten import fold_norm
from . import aten, reference
from . import triton_attention as attention
from .arguments import Layer, Options, Sums

if TYPE_CHECKING:
    from ...kernels.token_performer import FoldedLayer

# Widths up to which a token's row and all weights stay in registers.
_WIDEST = 64
_TOO_WIDE = f"the layer is wider than the {_WIDEST} channels, features or hidden units that fit"

# In the operators' schemas, which saved programs hold: a layer's weights with the LayerNorm folded in, and its options.
_LAYER = (
    "Tensor w, Tensor proj_weight, Tensor proj_bias, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, "
    "Tensor fc2_bias"
)
_OPTIONS = ", ".join(f"float {name}" for name in Options._fields)


def token_performer(kqv: Tensor, layer: Layer, options: Options) -> Tensor:
    """(B, T, 3E) to (B, T, E); see :func:`t2t_fast.ops.token_performer`."""
    if why_not_fused(kqv.device, kqv.dtype, layer, wants_gradient(kqv, *layer)):
        return reference.token_performer(kqv, layer, options, attention=attention.performer_attention)
    dtype = product_dtype(kqv)
    with no_autocast(kqv):
        weights = _fold(layer, kqv)
        seed = _draw_seed(kqv) if options.proj_drop or options.mlp_drop else None
        return _token_performer(kqv, *weights, seed, dtype, *options)[0]


def why_not_token_performer(kqv: Tensor, layer: Layer, options: Options) -> str | None:
    """None, or why it cannot run."""
    return why_not_layer(kqv, layer)


def why_not_auto_token_performer(kqv: Tensor, layer: Layer, options: Options) -> str | None:
    """None, or why ``auto`` passes it over."""
    return common.why_not_auto(product_dtype(kqv), kqv)


def describe_token_performer(kqv: Tensor, layer: Layer, options: Options) -> str:
    """Which kernels a call takes."""
    reason = why_not_fused(kqv.device, kqv.dtype, layer, wants_gradient(kqv, *layer))
    return f"attention kernels, then library operations: {reason}" if reason else "fused"


def why_not_layer(x: Tensor, layer: Layer) -> str | None:
    """None, or why ``layer`` cannot run on tokens made of ``x``."""
    return attention.why_not_whole(layer.w) or common.why_not(product_dtype(x), x, *layer)


def why_not_fused(device: torch.device, dtype: torch.dtype, layer: Layer, differentiate: bool) -> str | None:
    """None, or why the layer's own kernels do not take keys, queries and values of ``dtype``."""
    if max(*layer.w.shape, *layer.fc1_weight.shape) > _WIDEST:
        return _TOO_WIDE
    if differentiate and layer.w.requires_grad:
        return "w is to be learned"
    if not _has_configs(device, dtype, differentiate):
        if differentiate:
            return "the kernels are not built for training in this precision on this GPU"
        return "the kernels are not built for this precision on this GPU"
    return None


@torch.compiler.assume_constant_result
def _has_configs(device: torch.device, dtype: torch.dtype, differentiate: bool) -> bool:
    from ...kernels import configs

    tables = (configs.TOKEN_PERFORMER, configs.TOKEN_PERFORMER_BACKWARD)[: 1 + differentiate]
    return all(configs.has_config(table, device, dtype) for table in tables)


def _fold(layer: Layer, tokens: Tensor) -> tuple[Tensor, ...]:
    """The operators' weights: fc1's with the LayerNorm's affine, if it has one, in them."""
    w, proj_weight, proj_bias, gamma, beta, fc1_weight, fc1_bias, fc2_weight, fc2_bias = layer
    if gamma is not None or beta is not None:
        norm = Norm(fc1_weight.new_ones(()) if gamma is None else gamma, beta, 0.0)
        fc1_weight, fc1_bias = fold_norm(fc1_weight, fc1_bias, norm, compute_dtype(tokens, fc1_weight))
    return w, proj_weight, proj_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias


def _draw_seed(x: Tensor) -> Tensor:
    """A seed of the masks (1,), int64, from torch's generator of ``x``'s device: no synchronisation, new in each
    replay of a CUDA graph, and restored with the generator by checkpointing."""
    return torch.randint(2**63 - 1, (1,), device=x.device)


@torch.library.custom_op(
    "t2t_fast::token_performer",
    mutates_args=(),
    schema=f"(Tensor kqv, {_LAYER}, Tensor? seed, ScalarType dtype, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
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
    *options: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens (B, T, E); and the sums over the keys, which backward needs."""
    from ...kernels import token_performer as kernels

    k, q, v = kqv.chunk(3, dim=-1)
    w, out = w.contiguous(), _like(v)
    layer = _contiguous(proj_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    sums, projected = attention.sum_keys(k, v, w, proj_weight)
    projected_sums = sums._replace(summary=projected)
    kernels.forward_launch(q, v, w, projected_sums, out, layer, seed, dtype, Options(*options)).run(v.device)
    return out, *sums


def _contiguous(*tensors: Tensor) -> FoldedLayer:
    from ...kernels.token_performer import FoldedLayer

    return FoldedLayer(*(t.contiguous() for t in tensors))


def _like(t: Tensor) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)


@_token_performer.register_fake
def _(kqv: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, v = kqv.chunk(3, dim=-1)
    return _like(v), *attention.empty_sums(v, w)


@torch.library.custom_op(
    "t2t_fast::token_performer_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor kqv, {_LAYER}, Tensor? seed, Tensor largest, Tensor total, Tensor summary, "
    f"ScalarType dtype, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
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
    *options: float,
) -> tuple[Tensor, ...]:
    """Gradients of kqv, and in float32 or better of the weights but w."""
    from ...kernels import configs
    from ...kernels import performer_attention as attention_kernels
    from ...kernels import token_performer as kernels
    from ...kernels.rows import num_splits

    (k, q, v), w = kqv.chunk(3, dim=-1), w.contiguous()
    splits, device, sums = num_splits(k, configs.TOKEN_PERFORMER_BACKWARD), kqv.device, Sums(largest, total, summary)
    layer = _contiguous(proj_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    d_kqv = _like(kqv)
    dk, dq, dv = d_kqv.chunk(3, dim=-1)
    _, d_total, d_projected = attention.empty_sums(v, w, splits)
    d_layer = kernels.FoldedLayer(*(d_total.new_empty(*d_total.shape[:2], *t.shape) for t in layer))
    kernels.backward_launch(
        grad,
        q,
        v,
        w,
        sums._replace(summary=attention.project(sums, proj_weight, kqv.dtype)),
        layer,
        seed,
        dq,
        dv,
        d_total,
        d_projected,
        d_layer,
        dtype,
        Options(*options),
    ).run(device)
    d_projected = d_projected.sum(dim=1)
    d_sums = Sums(largest, d_total.sum(dim=1), d_projected @ proj_weight.to(summary.dtype))
    splits = num_splits(k, attention_kernels.key_table(needs_dw=False))
    attention_kernels.backward_key_launch(k, v, w, d_sums, dk, dv, None, splits, add_to_dv=True).run(device)
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
    seed: Tensor | None,
    largest: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    weights = (proj_weight, proj_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return _like(kqv), *(largest.new_empty(t.shape) for t in weights)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    kqv, w, proj_weight, proj_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, seed, ctx.dtype, *options = inputs
    _, *sums = output
    ctx.options = Options(*options)
    ctx.mark_non_differentiable(*sums)
    weights = (w, proj_weight, proj_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    ctx.save_for_backward(*sums, seed, kqv, *weights)


def _differentiate(ctx: Any, grad: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    largest, total, summary, seed, kqv, w, *weights = ctx.saved_tensors  # unpacked once: checkpointing insists
    nothing = (None,) * (2 + len(ctx.options))  # for seed, dtype and options
    if torch.is_grad_enabled():
        masks = _masks(kqv, w, weights, seed, ctx.dtype, ctx.options)
        inputs = (ctx.options, kqv, *masks, w, *weights)
        _, d_kqv, _, _, *d_weights = differentiable_backward(_definition, inputs, grad)
        return d_kqv, *d_weights, *nothing
    d_kqv, *d_weights = _backward(grad, kqv, w, *weights, seed, largest, total, summary, ctx.dtype, *ctx.options)
    return d_kqv, None, *(d.to(t.dtype) for d, t in zip(d_weights, weights, strict=True)), *nothing


def _definition(
    options: Options, kqv: Tensor, proj_mask: Tensor | None, mlp_mask: Tensor | None, *weights: Tensor
) -> Tensor:
    """The operator by library operations in float32 or better, given its masks."""
    dtype = compute_dtype(kqv)
    w, proj_weight, proj_bias, *mlp = (t.to(dtype) for t in weights)
    layer = Layer(w, proj_weight, proj_bias, None, None, *mlp)
    out, _ = aten.token_performer_with_masks(kqv.to(dtype), layer, aten.Masks(proj_mask, mlp_mask), options)
    return out


@torch.no_grad()
def _masks(
    kqv: Tensor,
    w: Tensor,
    weights: list[Tensor],
    seed: Tensor | None,
    dtype: torch.dtype,
    options: Options,
) -> aten.Masks:
    """The factors of both dropouts (B, T, E): what the operator makes of a bias of 1 and zeros elsewhere."""
    proj_weight, proj_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias = (torch.zeros_like(t) for t in weights)

    def mask(rate: float, proj_bias: Tensor, fc2_bias: Tensor) -> Tensor | None:
        layer = (w, proj_weight, proj_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        return _token_performer(torch.zeros_like(kqv), *layer, seed, dtype, *options)[0] if rate else None

    return aten.Masks(mask(options.proj_drop, proj_bias + 1, fc2_bias), mask(options.mlp_drop, proj_bias, fc2_bias + 1))


_token_performer.register_autograd(_differentiate, setup_context=_keep)


@register_flop_formula(torch.ops.t2t_fast.token_performer)
def _flops(kqv: Any, w: Any, proj_weight: Any, proj_bias: Any, fc1_weight: Any, *args: Any, **kwargs: Any) -> int:
    """The attention's, and a matmul with proj, fc1 and fc2 per token as the literal layer has them."""
    batch, tokens, triple = kqv
    dim, (hidden, _) = triple // 3, fc1_weight
    return attention.flops((batch, tokens, dim), w) + 2 * batch * tokens * dim * (dim + 2 * hidden)


@register_flop_formula(torch.ops.t2t_fast.token_performer_backward)
def _backward_flops(grad: Any, *args: Any, **kwargs: Any) -> int:
    """As a chain of matmuls: two for each of the forward's."""
    return 2 * _flops(*args)


def soft_split_performer(
    x: Tensor, kqv_weight: Tensor, kqv_bias: Tensor | None, split: Split, layer: Layer, options: Options
) -> Tensor:
    """(B, L, E); see :func:`t2t_fast.ops.soft_split_performer`."""
    return token_performer(soft_split.soft_split_linear(x, kqv_weight, kqv_bias, split), layer, options)


def why_not_soft_split_performer(
    x: Tensor, kqv_weight: Tensor, kqv_bias: Tensor | None, split: Split, layer: Layer, options: Options
) -> str | None:
    """None, or why it cannot run."""
    return soft_split.why_not_soft_split_linear(x, kqv_weight, kqv_bias, split) or why_not_layer(x, layer)


def why_not_auto_soft_split_performer(x: Tensor, *rest: Any) -> str | None:
    """None, or why ``auto`` passes it over."""
    return common.why_not_auto(product_dtype(x), x)


def describe_soft_split_performer(
    x: Tensor, kqv_weight: Tensor, kqv_bias: Tensor | None, split: Split, layer: Layer, options: Options
) -> str:
    """Which kernels a call takes behind the soft split's."""
    differentiate = wants_gradient(x, kqv_weight, kqv_bias, *layer)
    reason = why_not_fused(x.device, product_dtype(x), layer, differentiate)
    layer_by = f"attention kernels, then library operations: {reason}" if reason else "token_performer"
    return f"soft_split_linear, then {layer_by}"
