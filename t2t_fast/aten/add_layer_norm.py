"""The end of a residual branch and the LayerNorm behind it: the library's two operations."""

from __future__ import annotations

from torch import Tensor

from ..ops.common.branch import add_branch
from .layer_norm_linear import layer_norm


def forward(
    x: Tensor,
    y: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    branch_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``x + branch_scale * y`` and its LayerNorm, both (B, N, C) in the dtype of the sum."""
    total = add_branch(y, x, branch_scale)
    return total, layer_norm(total, norm_weight, norm_bias, eps).to(total.dtype)
