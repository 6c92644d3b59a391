"""Squeeze-and-excitation as ``torch.ops.t2t_fast.se_gate``: one pass for the mean, one for everything after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..numerics import compute_dtype, no_autocast
from ..ops.common import extension
from ..ops.common.autograd import differentiable_backward, in_dispatch_mode, wants_gradient
from ..reference import se_gate as reference


def forward(
    x: Tensor, w_reduce: Tensor, w_expand: Tensor, residual: Tensor | None, branch_scale: Tensor | None
) -> Tensor:
    """(B, N, C) to (B, N, C); see :func:`t2t_fast.ops.se_gate`."""
    dtype = compute_dtype(x)
    with no_autocast(x):
        gate = (w_reduce.to(dtype), w_expand.to(dtype))
        scale = None if branch_scale is None else branch_scale.to(dtype)
        return with_residual(lambda r: torch.ops.t2t_fast.se_gate(x, *gate, r, scale)[0], x.dtype, residual)


def why_not(
    x: Tensor, w_reduce: Tensor, w_expand: Tensor, residual: Tensor | None, branch_scale: Tensor | None
) -> str | None:
    """None, or why not."""
    return extension.why_not(x, w_reduce, w_expand, residual, branch_scale)


def why_not_auto(
    x: Tensor, w_reduce: Tensor, w_expand: Tensor, residual: Tensor | None, branch_scale: Tensor | None
) -> str | None:
    """None, or why ``auto`` passes it over (measured: benchmarks/results/se-*.json)."""
    if in_dispatch_mode():
        return "a TorchDispatchMode knows library operations"
    if x.device.type != "cpu" or x.dtype in (torch.float16, torch.bfloat16):
        return None
    if x.shape[0] < extension.num_threads():
        return "fewer images than threads: the library's passes are as fast"
    if residual is None and not wants_gradient(x, w_reduce, w_expand):
        return "the gate alone, without gradients or a residual: the library's two passes are as fast"
    return None


def with_residual(run: Any, dtype: torch.dtype, residual: Tensor | None) -> Tensor:
    """``run(residual)`` in the dtype that ``residual + run(None)`` would have, ``dtype`` being that of ``run(None)``.

    The operators add a residual of their own dtype, or one of float32 (as under autocast) to 16-bit values.
    """
    if residual is None:
        return run(None)
    common = torch.promote_types(dtype, residual.dtype)
    if common == torch.float64 != dtype:
        return residual + run(None)
    return run(residual.to(common))


def output_like(x: Tensor, residual: Tensor | None, channels: int) -> Tensor:
    """An output of ``channels`` without values: in the residual's dtype if there is one."""
    return x.new_empty(x.shape[0], x.shape[1], channels, dtype=x.dtype if residual is None else residual.dtype)


def _fake(
    x: Tensor, w_reduce: Tensor, w_expand: Tensor, residual: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, ...]:
    images, _, channels = x.shape
    return (
        output_like(x, residual, channels),
        w_reduce.new_empty(images, channels),
        w_reduce.new_empty(images, w_reduce.shape[0]),
        w_reduce.new_empty(images, channels),
    )


def _fake_backward(
    grad: Tensor, x: Tensor, mean: Tensor, reduced: Tensor, gate: Tensor, w_reduce: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return (
        x.new_empty(x.shape),
        w_reduce.new_empty(w_reduce.shape),
        w_reduce.new_empty(w_reduce.shape[1], w_reduce.shape[0]),
        w_reduce.new_empty(x.shape[0]),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w_reduce, w_expand, _, scale = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, *output[1:], w_reduce, w_expand, scale)


def _differentiate(ctx: Any, grad: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        x, *_, w_reduce, w_expand, scale = ctx.saved_tensors
        inputs = (x, w_reduce, w_expand, None, scale)
        d_x, d_reduce, d_expand, _, d_scale = differentiable_backward(reference.forward, inputs, grad)
    else:
        d_x, d_reduce, d_expand, d_scale = torch.ops.t2t_fast.se_gate_backward(grad, *ctx.saved_tensors)
    has_residual, has_scale = ctx.needs_input_grad[3], ctx.needs_input_grad[4]
    return d_x, d_reduce, d_expand, grad if has_residual else None, d_scale if has_scale else None


if extension.module is not None:
    torch.library.register_fake("t2t_fast::se_gate", _fake)
    torch.library.register_fake("t2t_fast::se_gate_backward", _fake_backward)
    torch.library.register_autograd("t2t_fast::se_gate", _differentiate, setup_context=_keep)
