"""The sum that ends a residual branch, and its LayerNorm, as ``torch.ops.t2t_fast.add_layer_norm``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...numerics import compute_dtype, no_autocast
from ..common import triton as common
from ..common.autograd import differentiable_backward, wants_gradient
from ..common.norm import Norm

SMALLEST = 2**23  # values (B, N, C): with fewer, an eager run waits for launches, not for memory
_TOO_SMALL = f"there are fewer than {SMALLEST} values: an operator's Python costs more than the pass it saves"

_MAX_CHANNELS = 2048  # that a block holds in registers
_TOO_WIDE = f"there are more channels than the kernel's {_MAX_CHANNELS}"


def add_layer_norm(x: Tensor, y: Tensor, norm: Norm, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sum and its LayerNorm, (B, N, C); see :func:`t2t_fast.ops.add_layer_norm`."""
    differentiate = wants_gradient(x, y, norm.weight, norm.bias)
    with no_autocast(x):
        total, normed, *_ = _add_layer_norm(x, y, norm.weight, norm.bias, scale, norm.eps, differentiate)
    return total, normed


def why_not_add_layer_norm(x: Tensor, y: Tensor, norm: Norm, scale: Tensor | None) -> str | None:
    """None, or why it cannot run."""
    if scale is not None and scale.requires_grad:
        return "the kernel has no gradient for branch_scale"
    reason = common.why_not(torch.promote_types(x.dtype, y.dtype), x, y, norm.weight, norm.bias, scale)
    if reason is not None:
        return reason
    return _TOO_WIDE if x.shape[2] > _MAX_CHANNELS else None


def why_not_auto_add_layer_norm(x: Tensor, y: Tensor, *rest: Any) -> str | None:
    """None, or why ``auto`` passes it over. By counting what goes through memory; not measured.

    Forward moves (B, N, C) four times, the library's sum and norm five times. Backward moves it four times, the
    library's eight times, with the gradients of the LayerNorm's weight and bias.
    """
    if x.device.type != "cuda":
        return "the interpreter is for tests"
    if torch.float64 in (x.dtype, y.dtype):
        return "float64 is left to the library"
    if torch.compiler.is_compiling():
        return "torch.compile fuses sum and norm itself"
    if x.numel() < SMALLEST:
        return _TOO_SMALL
    return None


@torch.library.custom_op(
    "t2t_fast::add_layer_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor y, Tensor? weight, Tensor? bias, Tensor? scale, float eps, bool differentiate) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _add_layer_norm(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
    differentiate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum and normed sum (B, N, C), and each token's mean and rstd (B, N): empty unless they will be needed."""
    from ...kernels import add_layer_norm as kernels

    total, normed, mean, rstd = _outputs(x, y, differentiate)
    weight, bias, scale = (None if t is None else t.contiguous() for t in (weight, bias, scale))
    statistics = (mean, rstd) if differentiate else None
    kernels.forward_launch(x.contiguous(), y.contiguous(), scale, weight, bias, total, normed, statistics, eps).run(
        x.device
    )
    return total, normed, mean, rstd


def _outputs(x: Tensor, y: Tensor, differentiate: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, y.dtype)
    total, normed = (x.new_empty(x.shape, dtype=dtype) for _ in range(2))
    statistics = x.shape[:2] if differentiate else (0,)
    mean, rstd = (x.new_empty(statistics, dtype=compute_dtype(total)) for _ in range(2))
    return total, normed, mean, rstd


@_add_layer_norm.register_fake
def _(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
    differentiate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs(x, y, differentiate)


@torch.library.custom_op(
    "t2t_fast::add_layer_norm_backward",
    mutates_args=(),
    schema="(Tensor? d_total, Tensor d_normed, Tensor total, Tensor mean, Tensor rstd, Tensor? weight, Tensor? scale, "
    "ScalarType x_dtype, ScalarType y_dtype, bool has_bias) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    d_total: Tensor | None,
    d_normed: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    x_dtype: torch.dtype,
    y_dtype: torch.dtype,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x; of y, empty where it is that of x; of the LayerNorm's weight and bias in float32 or better."""
    from ...kernels import add_layer_norm as kernels

    splits, channels = kernels.num_splits(total), total.shape[2]
    dx, dy, d_weight, d_bias = _gradients(total, mean, weight, scale, x_dtype, y_dtype, has_bias)
    weights, biases = (mean.new_empty(splits, channels) if w else None for w in (weight is not None, has_bias))
    kernels.backward_launch(
        None if d_total is None else d_total.contiguous(),
        d_normed.contiguous(),
        total,
        (mean, rstd),
        None if scale is None else scale.contiguous(),
        None if weight is None else weight.contiguous(),
        dx,
        dy if dy.numel() else None,
        weights,
        biases,
        splits,
    ).run(total.device)
    return dx, dy, d_weight if weights is None else weights.sum(0), d_bias if biases is None else biases.sum(0)


def _gradients(
    total: Tensor,
    mean: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    x_dtype: torch.dtype,
    y_dtype: torch.dtype,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = total.new_empty(total.shape, dtype=x_dtype)
    dy = total.new_empty(total.shape if scale is not None or x_dtype != y_dtype else (0,), dtype=y_dtype)
    d_weight, d_bias = (mean.new_empty(total.shape[2] if w else 0) for w in (weight is not None, has_bias))
    return dx, dy, d_weight, d_bias


@_backward.register_fake
def _(
    d_total: Tensor | None, d_normed: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _gradients(total, mean, *rest)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, weight, bias, scale, ctx.eps, _ = inputs
    total, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.dtypes = (x.dtype, y.dtype)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(total, mean, rstd, weight, scale)


def _differentiate(
    ctx: Any, d_total: Tensor | None, d_normed: Tensor | None, *unused: Tensor | None
) -> tuple[Tensor | None, ...]:
    total, mean, rstd, weight, scale = ctx.saved_tensors
    if d_normed is None:
        d_normed = torch.zeros_like(total)
    if torch.is_grad_enabled():
        return _differentiate_by_definition(ctx, d_total, d_normed, total, weight, scale)
    dx, dy, d_weight, d_bias = _backward(
        d_total, d_normed, total, mean, rstd, weight, scale, *ctx.dtypes, ctx.bias_dtype is not None
    )
    dy = dy if scale is not None or ctx.dtypes[0] != ctx.dtypes[1] else dx
    return (
        dx,
        dy,
        None if weight is None else d_weight.to(weight.dtype),
        None if ctx.bias_dtype is None else d_bias.to(ctx.bias_dtype),
        *(None,) * 3,
    )


def _differentiate_by_definition(
    ctx: Any, d_total: Tensor | None, d_normed: Tensor, total: Tensor, weight: Tensor | None, scale: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients by library operations, themselves differentiable."""

    def normed(total: Tensor, weight: Tensor | None) -> Tensor:
        return F.layer_norm(total, total.shape[-1:], weight, None, ctx.eps)

    through, d_weight = differentiable_backward(normed, (total, weight), d_normed)
    dx = d_total if through is None else through if d_total is None else through + d_total
    dy = None if dx is None or not ctx.needs_input_grad[1] else dx if scale is None else dx * scale[:, None, None]
    d_bias = d_normed.sum((0, 1)) if ctx.needs_input_grad[3] else None
    return dx, dy, d_weight, d_bias, *(None,) * 3


_add_layer_norm.register_autograd(_differentiate, setup_context=_keep)
