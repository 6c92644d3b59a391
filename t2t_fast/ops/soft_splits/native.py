"""``torch.ops.t2t_fast.windows_linear``, whose code is in ``csrc/soft_split``: soft split, LayerNorm and Linear.

Windows are rows of a matmul without being written anywhere. There is no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ...numerics import compute_dtype, no_autocast, product_dtype
from ..common import extension
from ..common.autograd import in_dispatch_mode, wants_gradient
from .arguments import Geometry, Split
from .aten import centred_and_offset
from .reference import as_image, window_grid


def soft_split_linear(x: Tensor, weight: Tensor, bias: Tensor | None, split: Split) -> Tensor:
    """(B, L, out); see :func:`t2t_fast.ops.soft_split_linear`."""
    image, norm, dtype = as_image(x, split.grid), split.norm, product_dtype(x)
    with no_autocast(x):
        if norm is not None:
            weight, bias = centred_and_offset(weight, bias, norm, compute_dtype(x, weight))
        return torch.ops.t2t_fast.windows_linear(
            image.to(dtype), weight, bias, *split.geometry, norm is not None, norm.eps if norm is not None else 0.0
        )


def why_not_soft_split_linear(x: Tensor, weight: Tensor, bias: Tensor | None, split: Split) -> str | None:
    """None, or why it cannot run."""
    norm = () if split.norm is None else (split.norm.weight, split.norm.bias)
    if wants_gradient(x, weight, bias, *norm):
        return "the extension's soft split has no gradient"
    if x.device.type == "cuda":
        return "the extension has no soft split for GPUs"
    reason = extension.why_not(x, weight, bias, *norm)
    if reason is None and not extension.multiplies(x.device.type, product_dtype(x)):
        return extension.why_not_multiply(product_dtype(x))
    return reason


def why_not_auto_soft_split_linear(x: Tensor, weight: Tensor, bias: Tensor | None, split: Split) -> str | None:
    """None, or why ``auto`` passes it over."""
    return "a TorchDispatchMode knows library operations" if in_dispatch_mode() else None


def _fake_windows_linear(
    image: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    normed: bool,
    eps: float,
) -> Tensor:
    height, width = window_grid(image.shape[2:], Geometry(*(_pair(size) for size in (kernel_size, stride, padding))))
    return image.new_empty(image.shape[0], height * width, weight.shape[0])


def _pair(size: Sequence[int]) -> tuple[int, int]:
    return size[0], size[1]


def _flops_of_windows_linear(image: Tensor, weight: Tensor, *args: object, out_val: Tensor, **kwargs: object) -> int:
    return 2 * out_val.numel() * weight.shape[1]


if extension.module is not None:
    torch.library.register_fake("t2t_fast::windows_linear", _fake_windows_linear)
    register_flop_formula(torch.ops.t2t_fast.windows_linear, get_raw=True)(_flops_of_windows_linear)
