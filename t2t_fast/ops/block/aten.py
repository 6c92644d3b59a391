"""Linears through oneDNN for float32 on x86 CPUs, forward and backward, and through ``F.linear`` everywhere else.

PyTorch gives float32 matmuls to MKL, which took twice oneDNN's time on one AMD CPU and 1.15 times on another, the
only kinds it was measured on. oneDNN's operator is the one that torch.compile's CPU backend uses.

Where no gradient is wanted, GELU and the residual's sum work in place: on a CPU a large tensor costs more to get from
the system than to compute.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from ...numerics import is_autocast, product_dtype
from ..common.autograd import in_dispatch_mode, is_exporting, is_transformed, may_overwrite, wants_gradient
from ..common.branch import Branch, add_branch
from ..common.norm import Norm
from .arguments import MlpWeights

_HAS_ONEDNN = (
    platform.machine().lower() in ("x86_64", "amd64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
_HAS_BFLOAT16 = _HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
# Multiply-adds of a float32 matmul from which oneDNN's operator is faster: each call takes about 10 us to set up, with
# gradients three times and autograd's calls besides.
_SMALL = 3 << 18
_SMALL_WITH_GRADIENTS = 1 << 22

# Tokens per image from which a convolution over a batch of images takes no longer than one over all tokens in a row.
_MANY_TOKENS = 128


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """(..., C) to (..., out)."""
    if not why_not_onednn(x, weight, bias):
        if wants_gradient(x, weight, bias):
            y = multiply_with_gradient(x, weight, bias)
            return F.gelu(y) if gelu else y
        return multiply(x, weight, bias, gelu)
    y = F.linear(x, weight, bias)
    if not gelu:
        return y
    return torch.ops.aten.gelu_(y) if may_overwrite(y) else F.gelu(y)


def describe_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> str:
    """Which library multiplies, and why."""
    reason = why_not_onednn(x, weight, bias)
    return f"torch.nn.functional.linear: {reason}" if reason else "oneDNN"


def mlp(x: Tensor, weights: MlpWeights, branch: Branch) -> Tensor:
    """(B, N, C) to (B, N, out), without a second hidden layer."""
    hidden = linear(x, weights.fc1_weight, weights.fc1_bias, gelu=True)
    y, residual = linear(hidden, weights.fc2_weight, weights.fc2_bias), branch.residual
    if residual is None or branch.scale is not None or not may_overwrite(y, residual):
        return add_branch(y, branch)
    return y.add_(residual) if torch.promote_types(y.dtype, residual.dtype) == y.dtype else residual + y


def describe_mlp(x: Tensor, weights: MlpWeights, branch: Branch) -> str:
    """Which library multiplies, and why."""
    return describe_linear(x, weights.fc1_weight, weights.fc1_bias)


def layer_norm_linear(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm, gelu: bool = False) -> Tensor:
    """(B, N, C) to (B, N, out)."""
    return linear(layer_norm(x, *norm), weight, bias, gelu)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the channels. A frozen model's has no weights, and torch's CPU kernel takes twice as long then."""
    return F.layer_norm(x, channels(x), *affine_for(x, weight, bias), eps)


def channels(x: Tensor) -> tuple[int]:
    """The shape that a LayerNorm over the channels has; a constant, too, where a tracer makes tensors of sizes."""
    return (int(x.shape[-1]) if torch.jit.is_tracing() else x.shape[-1],)


def affine_for(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """What to pass for weights that may be missing."""
    missing = weight is None and bias is None and x.device.type == "cpu" and x.dtype == torch.float32
    if missing and not (torch.compiler.is_compiling() or is_transformed()):
        return x.new_ones(x.shape[-1]), x.new_zeros(x.shape[-1])
    return weight, bias


def add_layer_norm(x: Tensor, y: Tensor, norm: Norm, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """``x + scale * y`` and its LayerNorm, both (B, N, C) in the dtype of the sum."""
    total = add_branch(y, Branch(x, scale))
    return total, layer_norm(total, *norm).to(total.dtype)


def why_not_onednn(x: Tensor, *weights: Tensor | None) -> str | None:
    """Why the matmul is not oneDNN's own operator; None if it is."""
    if x.device.type != "cpu" or not _HAS_ONEDNN:
        return "oneDNN's operator is for x86 CPUs"
    tensors = [x, *(t for t in weights if t is not None)]
    if is_autocast(x) or any(t.dtype != torch.float32 for t in tensors):
        return "oneDNN's operator is for float32, outside autocast"
    if is_transformed() or is_exporting():
        return "tracing, export, torch.func and forward-mode derivatives need library operations"
    if in_dispatch_mode():
        return "a TorchDispatchMode knows library operations"
    if any(type(t) not in (Tensor, nn.Parameter) or t.device != x.device for t in tensors) or x.numel() == 0:
        return "oneDNN's operator is for plain tensors with values"
    if not torch.compiler.is_compiling() and is_small(x, tensors[1]):
        return "the matmul is small: setting up oneDNN's operator takes longer than it saves"
    return None


def uses_onednn(x: Tensor) -> bool:
    """:func:`why_not_onednn` for tokens and weights of one dtype and device that run eagerly, whatever their number."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and _HAS_ONEDNN


def packs(x: Tensor) -> bool:
    """:func:`why_not_packed` for tokens and weights of one dtype and device that run eagerly."""
    return x.device.type == "cpu" and (_HAS_BFLOAT16 if x.dtype == torch.bfloat16 else uses_onednn(x))


def is_small(x: Tensor, weight: Tensor) -> bool:
    """Whether a float32 matmul of ``x`` (..., C) and ``weight`` (out, C) is faster through ``F.linear``."""
    if x.dtype != torch.float32:
        return False
    smallest = _SMALL_WITH_GRADIENTS if torch.is_grad_enabled() else _SMALL
    return x.numel() * weight.shape[0] < smallest


def why_not_packed(x: Tensor, weight: Tensor) -> str | None:
    """Why :func:`multiply_packed` cannot be taken, with all in the dtype of the matmul; None if it can."""
    if x.device.type != "cpu" or weight.device.type != "cpu" or not _HAS_ONEDNN:
        return "packed weights are for x86 CPUs"
    dtype = product_dtype(x)
    if dtype not in (torch.float32, torch.bfloat16) or (x.dtype != weight.dtype and not is_autocast(x)):
        return "packed weights are for matmuls in float32 and bfloat16"
    if dtype == torch.bfloat16 and not _HAS_BFLOAT16:
        return "this CPU has no bfloat16 matmuls"
    if torch.compiler.is_compiling() or is_transformed() or type(x) is not Tensor or x.numel() == 0:
        return "compilers, tracers and empty batches need library operations"
    if in_dispatch_mode():
        return "a TorchDispatchMode knows library operations"
    return None


def pack(weight: Tensor) -> Tensor:
    """``weight`` rearranged for oneDNN's matmuls: opaque, for :func:`multiply_packed` alone."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())


def multiply_packed(x: Tensor, packed: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """A Linear on rearranged weights, or on weights as they are; without gradients."""
    attribute, algorithm = ("gelu", "none") if gelu else ("none", "")
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, attribute, [], algorithm)


@torch.library.custom_op(
    "t2t_fast::linear", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor? bias, bool gelu) -> Tensor"
)
def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    return multiply_packed(x, weight, bias, gelu)


@multiply.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _keep_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.gelu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    if ctx.gelu:
        grad = torch.ops.aten.gelu_backward(grad, multiply(x, weight, bias, False))
    return *_gradients(ctx, grad, x, weight, multiply), None


def _gradients(
    ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, times: Callable[..., Tensor]
) -> tuple[Tensor | None, ...]:
    """Those of ``x``, weight and bias that are needed; ``times`` is :func:`multiply` or :func:`multiply_packed`."""
    dx = times(grad, weight.t(), None, False) if ctx.needs_input_grad[0] else None
    d_weight = _weight_gradient(grad, x) if ctx.needs_input_grad[1] else None
    d_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0) if ctx.needs_input_grad[2] else None
    return dx, d_weight, d_bias


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Σ grad xᵀ (out, C), as the gradient of a 1 x 1 convolution: as a matmul oneDNN would transpose both first."""
    batch = x.shape[0] if x.dim() > 2 and x.shape[-2] >= _MANY_TOKENS else 1
    rows, columns = (t.reshape(batch, -1, 1, t.shape[-1]).permute(0, 3, 1, 2) for t in (grad, x))
    weight = x.new_empty(rows.shape[1], columns.shape[1], 1, 1)  # whose values are not read
    mask = (False, True, False)
    _, gradient, _ = torch.ops.aten.convolution_backward(
        rows, columns, weight, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1, mask
    )
    return gradient.reshape(gradient.shape[:2])  # what torch can batch


class _Linear(torch.autograd.Function):
    """:func:`multiply` without GELU: eagerly, a custom operator takes several times as long to call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return multiply_packed(x, weight, bias, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The operator is differentiable and can be batched; oneDNN's own takes less time to call.
        times = multiply if torch.is_grad_enabled() or is_transformed() else multiply_packed
        x, weight = ctx.saved_tensors
        return _gradients(ctx, grad, x, weight, times)


def multiply_with_gradient(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`multiply` without GELU, where gradients are wanted."""
    return multiply(x, weight, bias, False) if torch.compiler.is_compiling() else _Linear.apply(x, weight, bias)


multiply.register_autograd(_differentiate_linear, setup_context=_keep_linear)


@register_flop_formula(torch.ops.t2t_fast.linear)
def _flops_of_linear(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    rows = 1
    for size in x[:-1]:
        rows *= size
    return 2 * rows * weight[0] * weight[1]
