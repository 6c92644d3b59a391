"""Squeeze-and-excitation without the two transposes of the literal form."""

from __future__ import annotations

from torch import Tensor

from ..numerics import compute_dtype, no_autocast
from ..ops.common.branch import add_branch
from ..reference.se_gate import gate


def forward(
    x: Tensor,
    w_reduce: Tensor,
    w_expand: Tensor,
    residual: Tensor | None = None,
    branch_scale: Tensor | None = None,
) -> Tensor:
    """(B, N, C) to (B, N, C) in the dtype of ``x``; the gate is computed in float32 or better."""
    dtype = compute_dtype(x)
    with no_autocast(x):
        g = gate(x.mean(dim=1, keepdim=True, dtype=dtype), w_reduce.to(dtype), w_expand.to(dtype))
        return add_branch((x * g).to(x.dtype), residual, branch_scale)
