"""The SE-augmented MLP as ``torch.ops.t2t_fast.se_mlp``: the gate is known before the second product runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..numerics import compute_dtype, no_autocast, product_dtype
from ..ops.common import extension
from ..ops.common.autograd import differentiable_backward, in_dispatch_mode, wants_gradient
from ..reference import se_mlp as reference
from .se_gate import output_like, with_residual


def forward(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    w_reduce: Tensor,
    w_expand: Tensor,
    residual: Tensor | None,
    branch_scale: Tensor | None,
) -> Tensor:
    """(B, N, C) to (B, N, out); see :func:`t2t_fast.ops.se_mlp`."""
    dtype, compute = product_dtype(x), compute_dtype(x)
    with no_autocast(x):
        tensors = (
            x.to(dtype),
            fc1_weight.to(dtype),
            None if fc1_bias is None else fc1_bias.to(compute),
            fc2_weight.to(dtype),
            None if fc2_bias is None else fc2_bias.to(compute),
            w_reduce.to(compute),
            w_expand.to(compute),
        )
        scale = None if branch_scale is None else branch_scale.to(compute)
        differentiate = wants_gradient(*tensors, scale, residual)
        return with_residual(lambda r: torch.ops.t2t_fast.se_mlp(*tensors, r, scale, differentiate)[0], dtype, residual)


def why_not(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, *rest: Tensor | None
) -> str | None:
    """None, or why not."""
    for weight in (fc1_weight, fc2_weight):
        if product_dtype(x) == x.dtype != weight.dtype:
            return f"the input is {x.dtype}, a weight {weight.dtype}: outside autocast they must agree"
    return extension.why_not(x, fc1_weight, fc1_bias, fc2_weight, *rest)


def why_not_auto(x: Tensor, *rest: Tensor | None) -> str | None:
    """None, or why ``auto`` passes it over (measured: benchmarks/results/se-*.json)."""
    if in_dispatch_mode():
        return "a TorchDispatchMode knows library operations"
    if x.device.type == "cpu" and x.shape[0] < extension.num_threads():
        return "fewer images than threads: the products are all that counts, and the library's are as fast"
    return None


def _fake(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    w_reduce: Tensor,
    w_expand: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    differentiate: bool,
) -> tuple[Tensor, ...]:
    (images, tokens, _), hidden, channels = x.shape, fc1_weight.shape[0], fc2_weight.shape[0]
    kept = images if differentiate else 0
    return (
        output_like(x, residual, channels),
        x.new_empty(kept, tokens, hidden),
        x.new_empty(kept, tokens, channels),
        w_reduce.new_empty(images, hidden),
        w_reduce.new_empty(images, w_reduce.shape[0]),
        w_reduce.new_empty(images, channels),
    )


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    w_reduce: Tensor,
    w_expand: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    shapes = (fc1_weight.shape[:1], fc2_weight.shape[:1], w_reduce.shape, w_expand.shape, x.shape[:1])
    d_fc1_bias, d_fc2_bias, d_reduce, d_expand, d_scale = (w_reduce.new_empty(shape) for shape in shapes)
    d_x, d_fc1, d_fc2 = (t.new_empty(t.shape) for t in (x, fc1_weight, fc2_weight))
    return d_x, d_fc1, d_fc1_bias, d_fc2, d_fc2_bias, d_reduce, d_expand, d_scale


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, scale, ctx.differentiate = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, scale, *output[1:])


def _differentiate(ctx: Any, grad: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        *tensors, scale = ctx.saved_tensors[:8]
        *grads, _, d_scale = differentiable_backward(_reference, (*tensors, None, scale), grad)
    else:
        *grads, d_scale = torch.ops.t2t_fast.se_mlp_backward(grad, *ctx.saved_tensors)
    grads += [grad, d_scale]
    return *(g if wanted else None for g, wanted in zip(grads, ctx.needs_input_grad[:9], strict=True)), None


def _reference(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None, *rest: Any
) -> Tensor:
    """The operator's definition: its biases come in the dtype of the gate."""
    fc1_bias, fc2_bias = (None if bias is None else bias.to(x.dtype) for bias in (fc1_bias, fc2_bias))
    return reference.forward(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, *rest)


def _flops(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Any,
    fc2_weight: Tensor,
    fc2_bias: Any,
    w_reduce: Tensor,
    *rest: Any,
    **kw: Any,
) -> int:
    rows = x.shape[0] * x.shape[1]
    return 2 * rows * (fc1_weight.numel() + fc2_weight.numel()) + 4 * x.shape[0] * w_reduce.numel()


def _flops_backward(grad: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * _flops(*args)


if extension.module is not None:
    torch.library.register_fake("t2t_fast::se_mlp", _fake)
    torch.library.register_fake("t2t_fast::se_mlp_backward", _fake_backward)
    torch.library.register_autograd("t2t_fast::se_mlp", _differentiate, setup_context=_keep)
    register_flop_formula(torch.ops.t2t_fast.se_mlp, get_raw=True)(_flops)
    register_flop_formula(torch.ops.t2t_fast.se_mlp_backward, get_raw=True)(_flops_backward)
