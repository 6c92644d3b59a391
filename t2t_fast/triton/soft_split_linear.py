"""Soft split, LayerNorm and Linear as ``torch.ops.t2t_fast.soft_split_linear``, on a centred weight.

The LayerNorm is folded into the weight by plain tensor operations outside, whose gradients autograd takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..aten import soft_split
from ..aten.soft_split_linear import fold_norm
from ..numerics import compute_dtype, no_autocast, product_dtype
from ..ops.common import triton as common
from ..ops.common.autograd import differentiable_backward, wants_gradient
from ..reference.soft_split import as_image, window_grid

Pair = tuple[int, int]

GEOMETRY = "int[2] kernel_size, int[2] stride, int[2] padding"


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    grid: Pair | None,
    eps: float,
    folded: bool = False,
) -> Tensor:
    """(B, L, out); see :func:`t2t_fast.ops.soft_split_linear`."""
    dtype, compute = product_dtype(x), compute_dtype(x, weight)
    with no_autocast(x):
        offset = None if bias is None else bias.to(compute)
        if norm_weight is not None:
            weight, offset = fold_norm(weight, bias, norm_weight, norm_bias, compute)
        tensors = (as_image(x, grid), weight, offset)
        differentiate = wants_gradient(*tensors)
        norm = folded or norm_weight is not None
        return _soft_split_linear(*tensors, dtype, kernel_size, stride, padding, norm, eps, differentiate)[0]


def why_not(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *geometry: Any,
) -> str | None:
    """None, or why not."""
    return common.why_not(product_dtype(x), x, weight, bias, norm_weight, norm_bias)


def why_not_auto(x: Tensor, *rest: Any) -> str | None:
    """None, or why ``auto`` passes it over."""
    return common.why_not_auto(product_dtype(x), x)


@torch.library.custom_op(
    "t2t_fast::soft_split_linear",
    mutates_args=(),
    schema=f"(Tensor image, Tensor weight, Tensor? offset, ScalarType dtype, {GEOMETRY}, bool norm, float eps, "
    "bool differentiate) -> (Tensor, Tensor, Tensor)",
)
def _soft_split_linear(
    image: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    dtype: torch.dtype,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    norm: bool,
    eps: float,
    differentiate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B, L, out) of ``dtype``, and each token's mean and rstd (B, L): empty unless they will be needed."""
    from ..kernels import soft_split_linear as kernels

    window, view = locate(image, kernel_size, stride, padding)
    tokens, *statistics = _outputs(image, weight, dtype, (view.grid_h, view.grid_w), norm and differentiate)
    kernels.forward_launch(
        image,
        kernels.pack_weight(weight, window, dtype),
        None if offset is None else offset.contiguous(),
        tokens,
        (statistics[0], statistics[1]) if norm and differentiate else None,
        view,
        window,
        norm,
        eps,
    ).run(image.device)
    return tokens, statistics[0], statistics[1]


@torch.library.custom_op(
    "t2t_fast::soft_split_linear_backward_weight",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor image, Tensor mean, Tensor rstd, ScalarType dtype, {GEOMETRY}, bool norm, "
    "bool has_offset) -> (Tensor, Tensor)",
)
def backward_weight(
    grad: Tensor,
    image: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dtype: torch.dtype,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    norm: bool,
    has_offset: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight (out, n) and the offset (out,), in float32 or better."""
    from ..kernels import soft_split_linear as kernels

    window, view = locate(image, kernel_size, stride, padding)
    accumulator, out_features = compute_dtype(grad), grad.shape[2]
    splits = kernels.num_splits(grad.shape[0] * grad.shape[1], window, out_features, dtype, grad.device)
    d_weight = grad.new_empty(splits, out_features, window.num_features, dtype=accumulator)
    d_offset = grad.new_empty(splits, out_features, dtype=accumulator) if has_offset else None
    statistics = (mean, rstd) if norm else None
    kernels.backward_weight_launch(grad.contiguous(), image, statistics, d_weight, d_offset, dtype, view, window).run(
        grad.device
    )
    total = grad.new_zeros(out_features, dtype=accumulator) if d_offset is None else d_offset.sum(0)
    return kernels.unpack_weight(d_weight.sum(0), window).contiguous(), total


@torch.library.custom_op(
    "t2t_fast::soft_split_linear_backward_input",
    mutates_args=(),
    schema="(Tensor grad, Tensor image, Tensor weight, Tensor? offset, Tensor tokens, Tensor mean, Tensor rstd, "
    f"ScalarType dtype, {GEOMETRY}, bool norm) -> Tensor",
)
def backward_input(
    grad: Tensor,
    image: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    tokens: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dtype: torch.dtype,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    norm: bool,
) -> Tensor:
    """Gradient of the image."""
    from ..kernels import soft_split_linear as kernels

    window, view = locate(image, kernel_size, stride, padding)
    grad, d_image, device = grad.contiguous(), torch.empty_like(image), image.device
    packed = kernels.pack_weight(weight, window, dtype)
    statistics = None
    if norm:
        statistics = (mean, rstd, torch.empty_like(rstd))
        offset = None if offset is None else offset.contiguous()
        kernels.coefficient_launch(grad, tokens, offset, *statistics[1:], window.num_features).run(device)
    kernels.backward_input_launch(grad, packed, image, statistics, d_image, view, window).run(device)
    return d_image


def locate(image: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Any:
    from ..kernels.windows import make_view, make_window

    # Neighbouring channels together where they lie together in memory, and are enough to be worth it.
    channels_last = image.stride(1) == 1 and image.shape[1] >= 16
    window = make_window(image.shape[1], kernel_size, stride, padding, channels_last)
    return window, make_view(image, window)


def _outputs(
    image: Tensor, weight: Tensor, dtype: torch.dtype, grid: Pair, with_statistics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (image.shape[0], grid[0] * grid[1])
    statistics = shape if with_statistics else (0,)
    mean, rstd = (image.new_empty(statistics, dtype=compute_dtype(image, weight)) for _ in range(2))
    return image.new_empty(*shape, weight.shape[0], dtype=dtype), mean, rstd


@_soft_split_linear.register_fake
def _(
    image: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    dtype: torch.dtype,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    norm: bool,
    eps: float,
    differentiate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grid = window_grid(image.shape[2:], kernel_size, stride, padding)
    return _outputs(image, weight, dtype, grid, norm and differentiate)


@backward_weight.register_fake
def _(
    grad: Tensor, image: Tensor, mean: Tensor, rstd: Tensor, dtype: torch.dtype, kernel_size: Sequence[int], *rest: Any
) -> tuple[Tensor, Tensor]:
    num_features = image.shape[1] * kernel_size[0] * kernel_size[1]
    accumulator = compute_dtype(grad)
    return grad.new_empty(grad.shape[2], num_features, dtype=accumulator), grad.new_empty(
        grad.shape[2], dtype=accumulator
    )


@backward_input.register_fake
def _(grad: Tensor, image: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(image)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    image, weight, offset, ctx.dtype, *ctx.geometry, ctx.norm, ctx.eps, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    # The tokens only where a window's variance passes a gradient on to the image.
    tokens = output[0] if ctx.norm and ctx.needs_input_grad[0] else output[1]
    ctx.save_for_backward(image, weight, offset, tokens, *output[1:])


def _differentiate(ctx: Any, grad: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    image, weight, offset, tokens, mean, rstd = ctx.saved_tensors
    if torch.is_grad_enabled():
        inputs = (image, weight, offset, ctx.geometry, ctx.norm, ctx.eps)
        return *differentiable_backward(_definition, inputs, grad)[:3], *(None,) * 7
    d_image = d_weight = d_offset = None
    if ctx.needs_input_grad[0]:
        d_image = backward_input(grad, image, weight, offset, tokens, mean, rstd, ctx.dtype, *ctx.geometry, ctx.norm)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        d_weight, d_offset = backward_weight(
            grad, image, mean, rstd, ctx.dtype, *ctx.geometry, ctx.norm, offset is not None
        )
        d_weight, d_offset = d_weight.to(weight.dtype), None if offset is None else d_offset.to(offset.dtype)
    return d_image, d_weight, d_offset, *(None,) * 7


def _definition(image: Tensor, weight: Tensor, offset: Tensor | None, geometry: Any, norm: bool, eps: float) -> Tensor:
    """The operator by library operations in float32 or better."""
    dtype = compute_dtype(image, weight)
    tokens = soft_split.forward(image.to(dtype), geometry[0], geometry[1], geometry[2], None)
    tokens = F.layer_norm(tokens, tokens.shape[-1:], eps=eps) if norm else tokens
    return F.linear(tokens, weight.to(dtype), None if offset is None else offset.to(dtype))


_soft_split_linear.register_autograd(_differentiate, setup_context=_keep)


@register_flop_formula(
    [
        torch.ops.t2t_fast.soft_split_linear,
        torch.ops.t2t_fast.soft_split_linear_backward_weight,
        torch.ops.t2t_fast.soft_split_linear_backward_input,
    ],
    get_raw=True,
)
def _flops(first: Tensor, second: Tensor, *args: Any, out_val: Any, **kwargs: Any) -> int:
    """Two per product: tokens times out times values of a window, in all three directions."""
    outputs = out_val if isinstance(out_val, tuple) else (out_val,)
    if first.ndim == 4:  # forward: image and weight to tokens
        return 2 * outputs[0].numel() * second.shape[1]
    if outputs[0].ndim == 2:  # gradient and image to the weight's gradient
        return 2 * first.shape[0] * first.shape[1] * outputs[0].numel()
    return 2 * first.numel() * args[0].shape[1]  # gradient, image and weight to the image's gradient
