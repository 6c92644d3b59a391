"""The MLP with the exact GELU in the first product's kernel; the second product is the library's."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..ops.common.branch import add_branch
from . import layer_norm_linear, linear


def forward(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    residual: Tensor | None = None,
    branch_scale: Tensor | None = None,
) -> Tensor:
    """(B, N, C) to (B, N, out)."""
    hidden = linear.forward(x, fc1_weight, fc1_bias, gelu=True)
    return add_branch(F.linear(hidden, fc2_weight, fc2_bias), residual, branch_scale)


def why_not(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, *rest: Any) -> str | None:
    """None, or why not."""
    return linear.why_not(x, fc1_weight, fc1_bias)


def why_not_auto(x: Tensor, *rest: Any) -> str | None:
    """None, or why ``auto`` passes it over."""
    return layer_norm_linear.why_not_auto(x)
