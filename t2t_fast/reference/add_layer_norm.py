"""The end of a residual branch and the LayerNorm behind it (paper §3.2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..ops.common.branch import add_branch
from ..ops.common.derivatives import standardize, standardize_backward


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
    return total, F.layer_norm(total, total.shape[-1:], norm_weight, norm_bias, eps).to(total.dtype)


def backward(
    d_total: Tensor,
    d_normed: Tensor,
    x: Tensor,
    y: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    branch_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of (x, y, norm_weight, norm_bias).

    With s = x + scale y and z = (s - mean) rstd::

        dz = gamma dn       ds = dt + rstd (dz - mean(dz) - z mean(z dz))       dx = ds       dy = scale ds
    """
    total = add_branch(y, x, branch_scale)
    z, rstd = standardize(total, eps)
    dz = d_normed if norm_weight is None else d_normed * norm_weight
    ds = d_total + standardize_backward(dz, z, rstd)
    return (
        ds,
        ds if branch_scale is None else ds * branch_scale[:, None, None],
        None if norm_weight is None else (d_normed * z).sum((0, 1)),
        None if norm_bias is None else d_normed.sum((0, 1)),
    )
