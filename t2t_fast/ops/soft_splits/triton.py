"""``torch.ops.t2t_fast.soft_split`` and ``soft_split_linear``, on the kernels of the same names.

The LayerNorm is folded into the Linear's weight, which is thereby centred, by plain tensor operations outside of the
operator: autograd takes their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ...numerics import compute_dtype, no_autocast, product_dtype
from ..common import triton as common
from ..common.autograd import differentiable_backward, wants_gradient
from . import aten
from .arguments import Geometry, Pair, Split
from .reference import as_image, window_grid

if TYPE_CHECKING:
    from ...kernels.lay_windows import Windows

# In the operators' schemas, which saved programs hold: neither names nor order may change.
GEOMETRY = ", ".join(f"int[2] {name}" for name in Geometry._fields)


def soft_split(x: Tensor, geometry: Geometry, grid: Pair | None) -> Tensor:
    """Tokens (B, L, C*kh*kw), contiguous: one copy, and a gather for its gradient."""
    return _soft_split(as_image(x, grid), *geometry)


def why_not_soft_split(x: Tensor, geometry: Geometry, grid: Pair | None) -> str | None:
    """None, or why it cannot run."""
    return common.why_not(x.dtype, x)


def why_not_auto_soft_split(x: Tensor, geometry: Geometry, grid: Pair | None) -> str | None:
    """None, or why ``auto`` passes it over: a copy is a copy in every dtype, so only in the interpreter."""
    return common.why_not_auto(x.dtype, x) if x.device.type == "cpu" else None


@torch.library.custom_op("t2t_fast::soft_split", mutates_args=(), schema=f"(Tensor image, {GEOMETRY}) -> Tensor")
def _soft_split(image: Tensor, *geometry: Pair) -> Tensor:
    from ...kernels import soft_split as kernels
    from ...kernels.windows import make_view, make_window, walkable

    image = walkable(image, Geometry(*geometry))
    window = make_window(image.shape[1], *Geometry(*geometry), channels_last=False)
    view = make_view(image, window)
    tokens = image.new_empty(image.shape[0], view.grid_h * view.grid_w, window.num_features)
    kernels.forward_launch(image, tokens, view, window).run(image.device)
    return tokens


@torch.library.custom_op(
    "t2t_fast::soft_split_backward",
    mutates_args=(),
    schema=f"(Tensor grad, SymInt[4] size, bool channels_last, {GEOMETRY}) -> Tensor",
)
def _soft_split_backward(grad: Tensor, size: Sequence[int], channels_last: bool, *geometry: Pair) -> Tensor:
    from ...kernels import soft_split as kernels
    from ...kernels.windows import make_view, make_window

    window = make_window(size[1], *Geometry(*geometry), channels_last=False)
    d_image = _empty_image(grad, size, channels_last)
    kernels.backward_launch(grad, d_image, make_view(d_image, window), window).run(grad.device)
    return d_image


@_soft_split.register_fake
def _(image: Tensor, *geometry: Pair) -> Tensor:
    (kernel_h, kernel_w), _, _ = geometry
    height, width = window_grid(image.shape[2:], Geometry(*geometry))
    return image.new_empty(image.shape[0], height * width, image.shape[1] * kernel_h * kernel_w)


@_soft_split_backward.register_fake
def _(grad: Tensor, size: Sequence[int], channels_last: bool, *geometry: Pair) -> Tensor:
    return _empty_image(grad, size, channels_last)


def _empty_image(like: Tensor, size: Sequence[int], channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _keep_split(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    image, *ctx.geometry = inputs
    # Tokens are a channels-last image: their gradient is made as tokens.
    ctx.size, ctx.channels_last = image.shape, image.stride(1) == 1 and image.shape[1] > 1


def _differentiate_split(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _soft_split_backward(grad, ctx.size, ctx.channels_last, *ctx.geometry), None, None, None


def _keep_split_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, _, *ctx.geometry = inputs


def _differentiate_split_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _soft_split(grad, *ctx.geometry), None, None, None, None, None  # linear, so this is its own transpose


_soft_split.register_autograd(_differentiate_split, setup_context=_keep_split)
_soft_split_backward.register_autograd(_differentiate_split_backward, setup_context=_keep_split_backward)


def soft_split_linear(x: Tensor, weight: Tensor, bias: Tensor | None, split: Split) -> Tensor:
    """(B, L, out); see :func:`t2t_fast.ops.soft_split_linear`."""
    dtype, compute, norm = product_dtype(x), compute_dtype(x, weight), split.norm
    with no_autocast(x):
        offset = bias
        if norm is not None and norm.weight is not None:
            weight, offset = aten.fold_norm(weight, bias, norm, compute)
        tensors = (as_image(x, split.grid), weight, offset)
        eps = 0.0 if norm is None else norm.eps
        return _soft_split_linear(*tensors, dtype, *split.geometry, norm is not None, eps, wants_gradient(*tensors))[0]


def why_not_soft_split_linear(x: Tensor, weight: Tensor, bias: Tensor | None, split: Split) -> str | None:
    """None, or why it cannot run."""
    gamma, beta = (None, None) if split.norm is None else (split.norm.weight, split.norm.bias)
    return common.why_not(product_dtype(x), x, weight, bias, gamma, beta)


def why_not_auto_soft_split_linear(x: Tensor, weight: Tensor, bias: Tensor | None, split: Split) -> str | None:
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
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    norm: bool,
    eps: float,
    differentiate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B, L, out) of ``dtype``, and each token's mean and rstd (B, L): empty unless they will be needed."""
    from ...kernels import soft_split_linear as kernels
    from ...kernels.lay_windows import pack_weight

    windows = _gather(image, Geometry(kernel_size, stride, padding))
    keeps = norm and differentiate
    tokens, mean, rstd = _outputs(image, weight, dtype, (windows.view.grid_h, windows.view.grid_w), keeps)
    kernels.forward_launch(
        windows,
        pack_weight(weight, windows, dtype),
        None if offset is None else offset.contiguous(),
        tokens,
        kernels.Statistics(mean, rstd) if keeps else None,
        norm,
        eps,
    ).run(image.device)
    return tokens, mean, rstd


@torch.library.custom_op(
    "t2t_fast::soft_split_linear_backward_weight",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor image, Tensor mean, Tensor rstd, ScalarType dtype, {GEOMETRY}, bool norm, "
    "bool has_offset) -> (Tensor, Tensor)",
)
def _backward_weight(
    grad: Tensor,
    image: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dtype: torch.dtype,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    norm: bool,
    has_offset: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight (out, n) and the offset (out,), in float32 or better."""
    from ...kernels import soft_split_linear_backward as kernels
    from ...kernels.lay_windows import unpack_weight
    from ...kernels.soft_split_linear import Statistics

    windows = _gather(image, Geometry(kernel_size, stride, padding))
    accumulator, out_features = compute_dtype(grad), grad.shape[2]
    splits = kernels.num_splits(grad.shape[0] * grad.shape[1], windows, out_features, dtype)
    d_weight = grad.new_empty(splits, out_features, windows.window.num_features, dtype=accumulator)
    d_offset = grad.new_empty(splits, out_features, dtype=accumulator) if has_offset else None
    statistics = Statistics(mean, rstd) if norm else None
    kernels.backward_weight_launch(grad.contiguous(), windows, statistics, d_weight, d_offset, dtype).run(grad.device)
    summed = grad.new_zeros(out_features, dtype=accumulator) if d_offset is None else d_offset.sum(0)
    return unpack_weight(d_weight.sum(0), windows).contiguous(), summed


@torch.library.custom_op(
    "t2t_fast::soft_split_linear_backward_input",
    mutates_args=(),
    schema="(Tensor grad, Tensor image, Tensor weight, Tensor? offset, Tensor tokens, Tensor mean, Tensor rstd, "
    f"ScalarType dtype, {GEOMETRY}, bool norm) -> Tensor",
)
def _backward_input(
    grad: Tensor,
    image: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    tokens: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dtype: torch.dtype,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    norm: bool,
) -> Tensor:
    """Gradient of the image."""
    from ...kernels import soft_split_linear_backward as kernels
    from ...kernels.lay_windows import lay_windows, pack_weight
    from ...kernels.windows import walkable

    geometry = Geometry(kernel_size, stride, padding)
    windows = lay_windows(walkable(image, geometry), geometry, in_blocks=False)
    grad, d_image, device = grad.contiguous(), torch.empty_like(image), image.device
    packed = pack_weight(weight, windows, dtype)
    given, coefficient = None, None
    if norm:
        given, coefficient = mean, torch.empty_like(rstd)
        scaled = torch.empty_like(grad, dtype=kernels.scaled_dtype(dtype))
        offset = None if offset is None else offset.contiguous()
        kernels.coefficient_launch(grad, tokens, offset, rstd, coefficient, scaled, windows.num_values).run(device)
        grad = scaled
    kernels.backward_input_launch(grad, packed, windows, given, coefficient, d_image).run(device)
    return d_image


def _gather(image: Tensor, geometry: Geometry) -> Windows:
    """The windows for the matmul kernels, ready to be read."""
    from ...kernels.lay_windows import blocks_launch, lay_windows
    from ...kernels.windows import walkable

    image = walkable(image, geometry)
    windows = lay_windows(image, geometry)
    if (launch := blocks_launch(image, windows, geometry.padding)) is not None:
        launch.run(image.device)
    return windows


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
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    norm: bool,
    eps: float,
    differentiate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grid = window_grid(image.shape[2:], Geometry(kernel_size, stride, padding))
    return _outputs(image, weight, dtype, grid, norm and differentiate)


@_backward_weight.register_fake
def _(
    grad: Tensor,
    image: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dtype: torch.dtype,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    norm: bool,
    has_offset: bool,
) -> tuple[Tensor, Tensor]:
    kernel_h, kernel_w = kernel_size
    out_features, accumulator = grad.shape[2], compute_dtype(grad)
    d_weight = grad.new_empty(out_features, image.shape[1] * kernel_h * kernel_w, dtype=accumulator)
    return d_weight, grad.new_empty(out_features, dtype=accumulator)


@_backward_input.register_fake
def _(grad: Tensor, image: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(image)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    image, weight, offset, ctx.dtype, *geometry, ctx.norm, ctx.eps, _ = inputs
    ctx.geometry = Geometry(*geometry)
    tokens, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    # The tokens only where a window's variance passes a gradient on to the image.
    kept = tokens if ctx.norm and ctx.needs_input_grad[0] else mean
    ctx.save_for_backward(image, weight, offset, kept, mean, rstd)


def _differentiate(ctx: Any, grad: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    image, weight, offset, tokens, mean, rstd = ctx.saved_tensors
    wants_image, wants_weight, wants_offset, *others = ctx.needs_input_grad
    nothing = (None,) * len(others)
    if torch.is_grad_enabled():
        inputs = (image, weight, offset, ctx.geometry, ctx.norm, ctx.eps)
        d_image, d_weight, d_offset, *_ = differentiable_backward(_definition, inputs, grad)
        return d_image, d_weight, d_offset, *nothing
    d_image = d_weight = d_offset = None
    if wants_image:
        tensors = (image, weight, offset, tokens, mean, rstd)
        d_image = _backward_input(grad, *tensors, ctx.dtype, *ctx.geometry, ctx.norm)
    if wants_weight or wants_offset:
        has_offset = offset is not None
        d_weight, d_offset = _backward_weight(grad, image, mean, rstd, ctx.dtype, *ctx.geometry, ctx.norm, has_offset)
        d_weight, d_offset = d_weight.to(weight.dtype), d_offset.to(offset.dtype) if has_offset else None
    return d_image, d_weight, d_offset, *nothing


def _definition(
    image: Tensor, weight: Tensor, offset: Tensor | None, geometry: Geometry, norm: bool, eps: float
) -> Tensor:
    """The operator by library operations in float32 or better."""
    dtype = compute_dtype(image, weight)
    tokens = aten.soft_split(image.to(dtype), geometry, None)
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
    """Two per multiply-add: tokens times out times values of a window, in all three directions."""
    outputs = out_val if isinstance(out_val, tuple) else (out_val,)
    if first.ndim == 4:  # forward: image and weight to tokens
        return 2 * outputs[0].numel() * second.shape[1]
    if outputs[0].ndim == 2:  # gradient and image to the weight's gradient
        return 2 * first.shape[0] * first.shape[1] * outputs[0].numel()
    return 2 * first.numel() * args[0].shape[1]  # gradient, image and weight to the image's gradient
