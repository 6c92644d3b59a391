"""The SE-augmented MLP: ``se_gate(fc2(gelu(fc1(x))))``, the gate taken from the token mean of the MLP's output."""

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


def backward(
    grad: Tensor,
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    w_reduce: Tensor,
    w_expand: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of all seven tensors: those of the gate, then those of the MLP for what the gate hands on."""
    weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    dy, d_reduce, d_expand = se_gate.backward(grad, mlp.forward(x, *weights), w_reduce, w_expand)
    return *mlp.backward(dy, x, *weights), d_reduce, d_expand
