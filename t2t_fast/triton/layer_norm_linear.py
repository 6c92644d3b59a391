"""A Linear with the LayerNorm in front and the GELU behind it as ``torch.ops.t2t_fast.layer_norm_linear``.

A token is a window of one pixel, so the kernels are those of the soft split: the LayerNorm is folded into the weight,
whose gradients autograd takes, and statistics come with the product. With GELU in the kernel the hidden layer is
written once and not read in between. Without a LayerNorm the products of backward are the library's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..aten.soft_split_linear import fold_norm
from ..numerics import compute_dtype, no_autocast, product_dtype
from ..ops.common import triton as common
from ..ops.common.autograd import differentiable_backward, wants_gradient
from ..reference.soft_split import as_image
from .soft_split_linear import backward_input, backward_weight, locate

_WINDOW = ((1, 1), (1, 1), (0, 0))


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    gelu: bool = False,
) -> Tensor:
    """(B, N, out); see :func:`t2t_fast.ops.layer_norm_linear`."""
    with no_autocast(x):
        gamma = weight.new_ones(()) if norm_weight is None else norm_weight
        weight, offset = fold_norm(weight, bias, gamma, norm_bias, compute_dtype(x, weight))
    return multiply(x, weight, offset, True, eps, gelu)


def multiply(x: Tensor, weight: Tensor, offset: Tensor | None, norm: bool, eps: float, gelu: bool) -> Tensor:
    """The operator; with ``norm``, on a centred weight."""
    dtype, differentiate = product_dtype(x), wants_gradient(x, weight, offset)
    with no_autocast(x):
        return _layer_norm_linear(x, weight, offset, dtype, norm, eps, gelu, differentiate)[0]


def why_not(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, *rest: Any
) -> str | None:
    """None, or why not."""
    return common.why_not(product_dtype(x), x, weight, bias, norm_weight, norm_bias)


def why_not_auto(x: Tensor, *rest: Any) -> str | None:
    """None, or why ``auto`` passes it over."""
    return common.why_not_auto(product_dtype(x), x) or common.why_not_measured()


@torch.library.custom_op(
    "t2t_fast::layer_norm_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? offset, ScalarType dtype, bool norm, float eps, bool gelu, "
    "bool differentiate) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _layer_norm_linear(
    x: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    dtype: torch.dtype,
    norm: bool,
    eps: float,
    gelu: bool,
    differentiate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B, N, out) of ``dtype``; for backward the same before GELU, and mean and rstd (B, N), empty unless needed."""
    from ..kernels import soft_split_linear as kernels

    y, plain, mean, rstd = _outputs(x, weight, dtype, norm, gelu, differentiate)
    image = as_image(x, (1, x.shape[1]))
    window, view = locate(image, *_WINDOW)
    kernels.forward_launch(
        image,
        kernels.pack_weight(weight, window, dtype),
        None if offset is None else offset.contiguous(),
        y,
        (mean, rstd) if norm and differentiate else None,
        view,
        window,
        norm,
        eps,
        gelu,
        plain if gelu and differentiate else None,
    ).run(x.device)
    return y, plain, mean, rstd


def _outputs(
    x: Tensor, weight: Tensor, dtype: torch.dtype, norm: bool, gelu: bool, differentiate: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, nothing = (x.shape[0], x.shape[1]), (0,)
    y = x.new_empty(*tokens, weight.shape[0], dtype=dtype)
    plain = x.new_empty(y.shape if gelu and differentiate else nothing, dtype=dtype)
    statistics = tokens if norm and differentiate else nothing
    mean, rstd = (x.new_empty(statistics, dtype=compute_dtype(x, weight)) for _ in range(2))
    return y, plain, mean, rstd


@_layer_norm_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    dtype: torch.dtype,
    norm: bool,
    eps: float,
    gelu: bool,
    differentiate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs(x, weight, dtype, norm, gelu, differentiate)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, offset, ctx.dtype, ctx.norm, ctx.eps, ctx.gelu, _ = inputs
    y, plain, mean, rstd = output
    ctx.mark_non_differentiable(plain, mean, rstd)
    # The result only where a token's variance passes a gradient on.
    tokens = plain if ctx.gelu or not (ctx.norm and ctx.needs_input_grad[0]) else y
    ctx.save_for_backward(x, weight, offset, tokens, mean, rstd)


def _differentiate(ctx: Any, grad: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, offset, tokens, mean, rstd = ctx.saved_tensors
    if torch.is_grad_enabled():
        inputs = (x, weight, offset, ctx.norm, ctx.eps, ctx.gelu)
        return *differentiable_backward(_definition, inputs, grad)[:3], *(None,) * 5
    if ctx.gelu:
        grad = torch.ops.aten.gelu_backward(grad, tokens)
    gradients = _normed_gradients if ctx.norm else _plain_gradients
    dx, d_weight, d_offset = gradients(ctx, grad, x, weight, offset, tokens, mean, rstd)
    return (
        dx,
        None if d_weight is None else d_weight.to(weight.dtype),
        None if d_offset is None or offset is None else d_offset.to(offset.dtype),
        *(None,) * 5,
    )


def _plain_gradients(
    ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, offset: Tensor | None, *unused: Tensor
) -> tuple[Tensor | None, ...]:
    rows = grad.flatten(0, 1)
    dx = (rows @ weight.to(grad.dtype)).view(x.shape).to(x.dtype) if ctx.needs_input_grad[0] else None
    d_weight = rows.t() @ x.flatten(0, 1).to(grad.dtype) if ctx.needs_input_grad[1] else None
    return dx, d_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def _normed_gradients(
    ctx: Any,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    tokens: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor | None, ...]:
    image = as_image(x, (1, x.shape[1]))
    dx = d_weight = d_offset = None
    if ctx.needs_input_grad[0]:
        d_image = backward_input(grad, image, weight, offset, tokens, mean, rstd, ctx.dtype, *_WINDOW, True)
        dx = d_image.flatten(2).transpose(1, 2)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        d_weight, d_offset = backward_weight(grad, image, mean, rstd, ctx.dtype, *_WINDOW, True, offset is not None)
    return dx, d_weight, d_offset


def _definition(x: Tensor, weight: Tensor, offset: Tensor | None, norm: bool, eps: float, gelu: bool) -> Tensor:
    """The operator by library operations in float32 or better."""
    dtype = compute_dtype(x, weight)
    normed = F.layer_norm(x.to(dtype), x.shape[-1:], eps=eps) if norm else x.to(dtype)
    y = F.linear(normed, weight.to(dtype), None if offset is None else offset.to(dtype))
    return F.gelu(y) if gelu else y


_layer_norm_linear.register_autograd(_differentiate, setup_context=_keep)


@register_flop_formula(torch.ops.t2t_fast.layer_norm_linear)
def _flops(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * x[0] * x[1] * x[2] * weight[0]
