"""The SE-augmented MLP over the token-major gate of :mod:`t2t_fast.aten.se_gate`."""

from __future__ import annotations

from torch import Tensor

from . import mlp, se_gate


def forward(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    w_reduce: Tensor,
    w_expand: Tensor,
    residual: Tensor | None = None,
    branch_scale: Tensor | None = None,
) -> Tensor:
    """(B, N, C) to (B, N, out)."""
    y = mlp.forward(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return se_gate.forward(y, w_reduce, w_expand, residual, branch_scale)
