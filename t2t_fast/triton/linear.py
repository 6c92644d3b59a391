"""A Linear with GELU behind it in one kernel: :mod:`t2t_fast.triton.layer_norm_linear` without the LayerNorm."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import layer_norm_linear
from .layer_norm_linear import multiply


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """(B, N, C) to (B, N, out)."""
    return multiply(x, weight, bias, False, 0.0, gelu)


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> str | None:
    """None, or why not."""
    return layer_norm_linear.why_not(x, weight, bias, None, None)


def why_not_auto(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> str | None:
    """None, or why ``auto`` passes it over."""
    return layer_norm_linear.why_not_auto(x) if gelu else "without GELU it is the library's product"
