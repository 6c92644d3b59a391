"""Soft split as ``torch.ops.t2t_fast.soft_split``: one copy, and a gather for its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.common import triton as common
from ..reference.soft_split import as_image, window_grid

Pair = tuple[int, int]

_GEOMETRY = "int[2] kernel_size, int[2] stride, int[2] padding"


def forward(x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, grid: Pair | None) -> Tensor:
    """Tokens (B, L, C*kh*kw), contiguous."""
    return _soft_split(as_image(x, grid), kernel_size, stride, padding)


def why_not(x: Tensor, *geometry: Any) -> str | None:
    """None, or why not."""
    return common.why_not(x.dtype, x)


def why_not_auto(x: Tensor, *geometry: Any) -> str | None:
    """None, or why ``auto`` passes it over: a copy is a copy in every dtype, so only in the interpreter."""
    return common.why_not_auto(x.dtype, x) if x.device.type == "cpu" else None


@torch.library.custom_op("t2t_fast::soft_split", mutates_args=(), schema=f"(Tensor image, {_GEOMETRY}) -> Tensor")
def _soft_split(image: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    from ..kernels import soft_split as kernels
    from ..kernels.windows import make_view, make_window

    window = make_window(image.shape[1], kernel_size, stride, padding, channels_last=False)
    view = make_view(image, window)
    tokens = image.new_empty(image.shape[0], view.grid_h * view.grid_w, window.num_features)
    kernels.forward_launch(image, tokens, view, window).run(image.device)
    return tokens


@torch.library.custom_op(
    "t2t_fast::soft_split_backward",
    mutates_args=(),
    schema=f"(Tensor grad, SymInt[4] size, bool channels_last, {_GEOMETRY}) -> Tensor",
)
def _soft_split_backward(
    grad: Tensor,
    size: Sequence[int],
    channels_last: bool,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    from ..kernels import soft_split as kernels
    from ..kernels.windows import make_view, make_window

    window = make_window(size[1], kernel_size, stride, padding, channels_last=False)
    d_image = _empty_image(grad, size, channels_last)
    kernels.backward_launch(grad, d_image, make_view(d_image, window), window).run(grad.device)
    return d_image


@_soft_split.register_fake
def _(image: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    height, width = window_grid(image.shape[2:], kernel_size, stride, padding)
    return image.new_empty(image.shape[0], height * width, image.shape[1] * kernel_size[0] * kernel_size[1])


@_soft_split_backward.register_fake
def _(grad: Tensor, size: Sequence[int], channels_last: bool, *geometry: Any) -> Tensor:
    return _empty_image(grad, size, channels_last)


def _empty_image(like: Tensor, size: Sequence[int], channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _keep_geometry(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    image, *ctx.geometry = inputs
    # Tokens are a channels-last image: their gradient is made as tokens.
    ctx.size, ctx.channels_last = image.shape, image.stride(1) == 1 and image.shape[1] > 1


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _soft_split_backward(grad, ctx.size, ctx.channels_last, *ctx.geometry), None, None, None


def _keep_backward_geometry(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.geometry = inputs[3:]


def _differentiate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _soft_split(grad, *ctx.geometry), None, None, None, None, None  # linear, so this is its own transpose


_soft_split.register_autograd(_differentiate, setup_context=_keep_geometry)
_soft_split_backward.register_autograd(_differentiate_backward, setup_context=_keep_backward_geometry)
