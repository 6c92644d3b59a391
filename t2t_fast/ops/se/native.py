"""``torch.ops.t2t_fast.se_gate`` and ``se_mlp``, whose code is in ``csrc/se``: shapes, gradients and FLOPs.

The gate alone takes one pass over the tokens for the mean and one for everything after it. Behind an MLP the gate is
known before the second matmul runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ...numerics import compute_dtype, no_autocast, product_dtype
from ..block.arguments import MlpWeights
from ..common import extension
from ..common.autograd import differentiable_backward, in_dispatch_mode, wants_gradient
from ..common.branch import Branch
from . import reference
from .arguments import GateWeights


def se_gate(x: Tensor, gate: GateWeights, branch: Branch) -> Tensor:
    """(B, N, C) to (B, N, C); see :func:`t2t_fast.ops.se_gate`."""
    dtype = compute_dtype(x)
    with no_autocast(x):
        w_reduce, w_expand, scale = (_cast(t, dtype) for t in (*gate, branch.scale))

        def run(residual: Tensor | None) -> Tensor:
            return torch.ops.t2t_fast.se_gate(x, w_reduce, w_expand, residual, scale)[0]

        return _with_residual(run, x.dtype, branch.residual)


def why_not_se_gate(x: Tensor, gate: GateWeights, branch: Branch) -> str | None:
    """None, or why it cannot run."""
    return extension.why_not(x, *gate, *branch)


def why_not_auto_se_gate(x: Tensor, gate: GateWeights, branch: Branch) -> str | None:
    """None, or why ``auto`` passes it over (measured: benchmarks/results/se-*.json)."""
    if in_dispatch_mode():
        return "a TorchDispatchMode knows library operations"
    if x.device.type != "cpu" or x.dtype in (torch.float16, torch.bfloat16):
        return None
    if x.shape[0] < extension.num_threads():
        return "fewer images than threads: the library's passes are as fast"
    if branch.residual is None and not wants_gradient(x, *gate):
        return "the gate alone, without gradients or a residual: the library's two passes are as fast"
    return None


def se_mlp(x: Tensor, weights: MlpWeights, gate: GateWeights, branch: Branch) -> Tensor:
    """(B, N, C) to (B, N, out); see :func:`t2t_fast.ops.se_mlp`."""
    dtype, compute = product_dtype(x), compute_dtype(x)
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
    with no_autocast(x):
        x, fc1_weight, fc2_weight = (t.to(dtype) for t in (x, fc1_weight, fc2_weight))
        small = (fc1_bias, fc2_bias, *gate, branch.scale)
        fc1_bias, fc2_bias, w_reduce, w_expand, scale = (_cast(t, compute) for t in small)
        tensors = (x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, w_reduce, w_expand)
        differentiate = wants_gradient(*tensors, *branch)

        def run(residual: Tensor | None) -> Tensor:
            return torch.ops.t2t_fast.se_mlp(*tensors, residual, scale, differentiate)[0]

        return _with_residual(run, dtype, branch.residual)


def why_not_se_mlp(x: Tensor, weights: MlpWeights, gate: GateWeights, branch: Branch) -> str | None:
    """None, or why it cannot run."""
    for weight in (weights.fc1_weight, weights.fc2_weight):
        if product_dtype(x) == x.dtype != weight.dtype:
            return "the input and a weight differ in dtype: outside autocast they must agree"
    return extension.why_not(x, *weights, *gate, *branch)


def why_not_auto_se_mlp(x: Tensor, weights: MlpWeights, gate: GateWeights, branch: Branch) -> str | None:
    """None, or why ``auto`` passes it over (measured: benchmarks/results/se-*.json)."""
    if in_dispatch_mode():
        return "a TorchDispatchMode knows library operations"
    if x.device.type == "cpu" and x.shape[0] < extension.num_threads():
        return "fewer images than threads: the matmuls are all that counts, and the library's are as fast"
    return None


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _with_residual(run: Callable[[Tensor | None], Tensor], dtype: torch.dtype, residual: Tensor | None) -> Tensor:
    """Cast the result to promote(residual.dtype, dtype), where ``dtype`` is that of the result without ``residual``.

    The operators add a residual of their own dtype, or one of float32 (as under autocast) to 16-bit values.
    """
    if residual is None:
        return run(None)
    common = torch.promote_types(dtype, residual.dtype)
    if common == torch.float64 != dtype:
        return residual + run(None)
    return run(residual.to(common))


def _output_like(x: Tensor, residual: Tensor | None, channels: int) -> Tensor:
    """An output of ``channels`` without values: in the residual's dtype if there is one."""
    return x.new_empty(x.shape[0], x.shape[1], channels, dtype=x.dtype if residual is None else residual.dtype)


def _fake_se_gate(
    x: Tensor, w_reduce: Tensor, w_expand: Tensor, residual: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, ...]:
    images, _, channels = x.shape
    return (
        _output_like(x, residual, channels),
        w_reduce.new_empty(images, channels),
        w_reduce.new_empty(images, w_reduce.shape[0]),
        w_reduce.new_empty(images, channels),
    )


def _fake_se_gate_backward(
    grad: Tensor, x: Tensor, mean: Tensor, reduced: Tensor, gate: Tensor, w_reduce: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return (
        x.new_empty(x.shape),
        w_reduce.new_empty(w_reduce.shape),
        w_reduce.new_empty(w_reduce.shape[1], w_reduce.shape[0]),
        w_reduce.new_empty(x.shape[0]),
    )


def _keep_se_gate(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w_reduce, w_expand, _, scale = inputs
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(x, *kept, w_reduce, w_expand, scale)


def _differentiate_se_gate(ctx: Any, grad: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        x, *_, w_reduce, w_expand, scale = ctx.saved_tensors
        inputs = (x, w_reduce, w_expand, scale)
        d_x, d_reduce, d_expand, d_scale = differentiable_backward(_se_gate_by_reference, inputs, grad)
    else:
        d_x, d_reduce, d_expand, d_scale = torch.ops.t2t_fast.se_gate_backward(grad, *ctx.saved_tensors)
    *_, wants_residual, wants_scale = ctx.needs_input_grad
    return d_x, d_reduce, d_expand, grad if wants_residual else None, d_scale if wants_scale else None


def _se_gate_by_reference(x: Tensor, w_reduce: Tensor, w_expand: Tensor, scale: Tensor | None) -> Tensor:
    """What the operator computes without a residual, whose gradient is that of the result."""
    return reference.se_gate(x, GateWeights(w_reduce, w_expand), Branch(None, scale))


def _fake_se_mlp(
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
        _output_like(x, residual, channels),
        x.new_empty(kept, tokens, hidden),
        x.new_empty(kept, tokens, channels),
        w_reduce.new_empty(images, hidden),
        w_reduce.new_empty(images, w_reduce.shape[0]),
        w_reduce.new_empty(images, channels),
    )


def _fake_se_mlp_backward(
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


def _keep_se_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, scale, ctx.differentiate = inputs
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(*tensors, scale, *kept)


def _differentiate_se_mlp(ctx: Any, grad: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        *inputs, _, _, _, _, _ = ctx.saved_tensors  # without what forward kept
        *grads, d_scale = differentiable_backward(_se_mlp_by_reference, tuple(inputs), grad)
    else:
        *grads, d_scale = torch.ops.t2t_fast.se_mlp_backward(grad, *ctx.saved_tensors)
    grads += [grad, d_scale, None]
    return tuple(g if wanted else None for g, wanted in zip(grads, ctx.needs_input_grad, strict=True))


def _se_mlp_by_reference(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    w_reduce: Tensor,
    w_expand: Tensor,
    scale: Tensor | None,
) -> Tensor:
    """As :func:`_se_gate_by_reference`; the operator's biases come in the dtype of the gate."""
    weights = MlpWeights(fc1_weight, _cast(fc1_bias, x.dtype), fc2_weight, _cast(fc2_bias, x.dtype))
    return reference.se_mlp(x, weights, GateWeights(w_reduce, w_expand), Branch(None, scale))


def _flops_of_se_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Any,
    fc2_weight: Tensor,
    fc2_bias: Any,
    w_reduce: Tensor,
    *rest: Any,
    **kwargs: Any,
) -> int:
    rows = x.shape[0] * x.shape[1]
    return 2 * rows * (fc1_weight.numel() + fc2_weight.numel()) + 4 * x.shape[0] * w_reduce.numel()


def _flops_of_se_mlp_backward(grad: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * _flops_of_se_mlp(*args)


if extension.module is not None:
    torch.library.register_fake("t2t_fast::se_gate", _fake_se_gate)
    torch.library.register_fake("t2t_fast::se_gate_backward", _fake_se_gate_backward)
    torch.library.register_autograd("t2t_fast::se_gate", _differentiate_se_gate, setup_context=_keep_se_gate)
    torch.library.register_fake("t2t_fast::se_mlp", _fake_se_mlp)
    torch.library.register_fake("t2t_fast::se_mlp_backward", _fake_se_mlp_backward)
    torch.library.register_autograd("t2t_fast::se_mlp", _differentiate_se_mlp, setup_context=_keep_se_mlp)
    register_flop_formula(torch.ops.t2t_fast.se_mlp, get_raw=True)(_flops_of_se_mlp)
    register_flop_formula(torch.ops.t2t_fast.se_mlp_backward, get_raw=True)(_flops_of_se_mlp_backward)
