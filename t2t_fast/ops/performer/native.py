"""``torch.ops.t2t_fast.performer_layer``, whose code is in ``csrc/performer``: shapes, gradients and FLOPs.

One pass over the tokens sums up keys and values, one carries blocks of queries through attention, projection, LayerNorm
and MLP in a core's cache. Backward keeps those sums alone and computes the rest again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ...numerics import no_autocast, product_dtype
from ..common import extension
from ..common.autograd import differentiable_backward, in_dispatch_mode
from ..soft_splits import aten as aten_soft_split
from ..soft_splits import native as native_soft_split
from ..soft_splits.arguments import Split
from .arguments import Layer, Options
from .aten import Masks, draw_masks, token_performer_with_masks

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def token_performer(kqv: Tensor, layer: Layer, options: Options) -> Tensor:
    """(B, T, 3E) to (B, T, E); see :func:`t2t_fast.ops.token_performer`."""
    kqv = kqv.to(product_dtype(kqv))
    masks = draw_masks(kqv, options)
    with no_autocast(kqv):
        weights = _complete(layer)
        output, *_ = torch.ops.t2t_fast.performer_layer(kqv, *masks, *weights, options.eps, options.norm_eps)
    return output


def _complete(layer: Layer) -> Layer:
    """The layer in float32, the LayerNorm with both weights."""
    channels = layer.proj_bias
    norm_weight = torch.ones_like(channels) if layer.norm_weight is None else layer.norm_weight
    norm_bias = torch.zeros_like(channels) if layer.norm_bias is None else layer.norm_bias
    complete: Any = layer._replace(norm_weight=norm_weight, norm_bias=norm_bias)
    return Layer(*(t.float() for t in complete))


def why_not_token_performer(kqv: Tensor, layer: Layer, options: Options) -> str | None:
    """None, or why it cannot run."""
    if kqv.device.type == "cuda":
        return "the extension has no token layer for GPUs"
    if product_dtype(kqv) not in _DTYPES or layer.w.dtype not in _DTYPES:
        return "the extension's token layer computes in float32"
    if kqv.numel() == 0:
        return "there are no tokens"
    reason = extension.why_not(kqv, *layer)
    if reason is None and not extension.multiplies(kqv.device.type, torch.float32):
        return extension.why_not_multiply(torch.float32)
    return reason


def why_not_auto_token_performer(kqv: Tensor, layer: Layer, options: Options) -> str | None:
    """None, or why ``auto`` passes it over."""
    return "a TorchDispatchMode knows library operations" if in_dispatch_mode() else None


def soft_split_performer(
    x: Tensor, kqv_weight: Tensor, kqv_bias: Tensor | None, split: Split, layer: Layer, options: Options
) -> Tensor:
    """One after the other, (B, L, E); the soft split through the library where gradients are wanted."""
    kqv = (x, kqv_weight, kqv_bias, split)
    without = native_soft_split.why_not_soft_split_linear(*kqv)
    linear = aten_soft_split.soft_split_linear if without else native_soft_split.soft_split_linear
    return token_performer(linear(*kqv), layer, options)


def why_not_soft_split_performer(
    x: Tensor, kqv_weight: Tensor, kqv_bias: Tensor | None, split: Split, layer: Layer, options: Options
) -> str | None:
    """None, or why it cannot run."""
    return why_not_token_performer(x, layer, options)


def why_not_auto_soft_split_performer(
    x: Tensor, kqv_weight: Tensor, kqv_bias: Tensor | None, split: Split, layer: Layer, options: Options
) -> str | None:
    """None, or why ``auto`` passes it over."""
    return why_not_auto_token_performer(x, layer, options)


def describe_soft_split_performer(
    x: Tensor, kqv_weight: Tensor, kqv_bias: Tensor | None, split: Split, layer: Layer, options: Options
) -> str:
    """Which soft split runs, and why."""
    without = native_soft_split.why_not_soft_split_linear(x, kqv_weight, kqv_bias, split)
    return f"soft split through the library: {without}" if without else "soft split of the extension"


def _fake_layer(
    kqv: Tensor, proj_mask: Tensor | None, mlp_mask: Tensor | None, w: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    (images, tokens, width), features = kqv.shape, w.shape[0]
    output = kqv.new_empty(images, tokens, width // 3)
    return output, w.new_empty(images, features), w.new_empty(images, features, width // 3)


def _fake_layer_backward(
    grad: Tensor, kqv: Tensor, proj_mask: Tensor | None, mlp_mask: Tensor | None, *rest: Any
) -> list[Tensor]:
    *weights, _, _, _, _, needs_w = rest
    w, *others = weights
    d_w = w.new_empty(w.shape) if needs_w else w.new_empty(0)
    return [kqv.new_empty(kqv.shape), d_w, *(t.new_empty(t.shape) for t in others)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.eps, ctx.norm_eps = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def _differentiate(ctx: Any, grad: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, total, summary = ctx.saved_tensors
    needs_w = ctx.needs_input_grad[3]
    if torch.is_grad_enabled():
        d_kqv, _, _, *d_layer = differentiable_backward(_by_library(ctx.eps, ctx.norm_eps), tuple(inputs), grad)
    else:
        d_kqv, *d_layer = torch.ops.t2t_fast.performer_layer_backward(
            grad, *inputs, total, summary, ctx.eps, ctx.norm_eps, needs_w
        )
    grads = (d_kqv, None, None, *d_layer, None, None)
    return tuple(g if wanted else None for g, wanted in zip(grads, ctx.needs_input_grad, strict=True))


def _by_library(eps: float, norm_eps: float) -> Any:
    """The operator as library operations in float32, for second derivatives."""

    def run(kqv: Tensor, proj_mask: Tensor | None, mlp_mask: Tensor | None, *layer: Tensor) -> Tensor:
        masks = Masks(*(None if mask is None else mask.float() for mask in (proj_mask, mlp_mask)))
        return token_performer_with_masks(kqv.float(), Layer(*layer), masks, Options(0.0, 0.0, eps, norm_eps))[0]

    return run


def _flops_of_layer(kqv: Tensor, proj_mask: Any, mlp_mask: Any, *rest: Any, **kwargs: Any) -> int:
    """Both phi, their two products, the denominators, the MLP; and the projection of each image's summary."""
    return _count(kqv, *rest, of_w=4, of_fc1=1, of_fc2=1, of_proj=1)


def _flops_of_layer_backward(
    grad: Tensor, kqv: Tensor, proj_mask: Any, mlp_mask: Any, *rest: Any, **kwargs: Any
) -> int:
    """Three of forward's products with phi and that with fc1 are computed again."""
    *layer, _, _, _, _, needs_w = rest
    return _count(kqv, *layer, of_w=11 if needs_w else 9, of_fc1=3, of_fc2=2, of_proj=3)


def _count(kqv: Tensor, *layer: Any, of_w: int, of_fc1: int, of_fc2: int, of_proj: int) -> int:
    """Two per multiply-add, for so many matmuls of each size."""
    w, proj_weight, _, _, _, fc1_weight, _, fc2_weight, *_ = layer
    per_token = of_w * w.numel() + w.shape[0] + of_fc1 * fc1_weight.numel() + of_fc2 * fc2_weight.numel()
    per_image = of_proj * w.shape[0] * proj_weight.numel()
    return 2 * kqv.shape[0] * (kqv.shape[1] * per_token + per_image)


if extension.module is not None:
    torch.library.register_fake("t2t_fast::performer_layer", _fake_layer)
    torch.library.register_fake("t2t_fast::performer_layer_backward", _fake_layer_backward)
    torch.library.register_autograd("t2t_fast::performer_layer", _differentiate, setup_context=_keep)
    register_flop_formula(torch.ops.t2t_fast.performer_layer, get_raw=True)(_flops_of_layer)
    register_flop_formula(torch.ops.t2t_fast.performer_layer_backward, get_raw=True)(_flops_of_layer_backward)
