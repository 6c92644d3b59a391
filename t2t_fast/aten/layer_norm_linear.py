"""LayerNorm and a Linear through the faster of the library's products; see :mod:`t2t_fast.aten.linear`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.common.autograd import is_transformed
from . import linear


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    gelu: bool = False,
) -> Tensor:
    """(B, N, C) to (B, N, out)."""
    return linear.forward(layer_norm(x, norm_weight, norm_bias, eps), weight, bias, gelu)


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


def detail(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> str:
    """Which library multiplies, and why."""
    return linear.detail(x, weight, bias)
