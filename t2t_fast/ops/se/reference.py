"""The definitions: squeeze-and-excitation over tokens (paper §3.3, "SE"; arXiv 1709.01507), alone and behind an MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...numerics import compute_dtype, no_autocast
from ..block import reference as block
from ..block.arguments import MlpWeights
from ..common.branch import Branch, add_branch
from .arguments import GateWeights


def factors(mean: Tensor, gate: GateWeights) -> Tensor:
    """``sigmoid(W_expand relu(W_reduce mean))``, by which the gate scales the channels, in the dtype of ``mean``."""
    hidden = F.relu(F.linear(mean, gate.w_reduce.to(mean.dtype)))
    return torch.sigmoid(F.linear(hidden, gate.w_expand.to(mean.dtype)))


def se_gate(x: Tensor, gate: GateWeights, branch: Branch) -> Tensor:
    """(B, N, C) to (B, N, C) in the dtype of ``x``; the gate is computed in float32 or better."""
    with no_autocast(x):
        mean = F.adaptive_avg_pool1d(x.transpose(1, 2).to(compute_dtype(x)), 1).squeeze(2)
        return add_branch((x * factors(mean, gate).unsqueeze(1)).to(x.dtype), branch)


def se_gate_backward(grad: Tensor, x: Tensor, gate: GateWeights) -> tuple[Tensor, GateWeights]:
    """Gradients of x and of the gate's weights, without a residual.

    With s = mean(x), h = relu(W_r s) and g = sigmoid(W_e h)::

        dg = Σ_tokens dy x      dz = dg g (1 - g)      dh = (W_eᵀ dz) [h > 0]
        dW_e = Σ dz hᵀ          dW_r = Σ dh sᵀ         dx = dy g + W_rᵀ dh / N
    """
    mean = x.mean(dim=1)
    hidden = F.relu(F.linear(mean, gate.w_reduce))
    g = torch.sigmoid(F.linear(hidden, gate.w_expand))
    dz = (grad * x).sum(dim=1) * g * (1 - g)
    d_hidden = (dz @ gate.w_expand) * (hidden > 0)
    dx = grad * g.unsqueeze(1) + (d_hidden @ gate.w_reduce).unsqueeze(1) / x.shape[1]
    return dx, GateWeights(d_hidden.T @ mean, dz.T @ hidden)


def se_mlp(x: Tensor, weights: MlpWeights, gate: GateWeights, branch: Branch) -> Tensor:
    """``se_gate(fc2(gelu(fc1(x))))``, the gate taken from the token mean of the MLP's output: to (B, N, out)."""
    return se_gate(block.mlp(x, weights, Branch()), gate, branch)


def se_mlp_backward(
    grad: Tensor, x: Tensor, weights: MlpWeights, gate: GateWeights
) -> tuple[Tensor, MlpWeights, GateWeights]:
    """Gradients of x and of all weights: those of the gate, then those of the MLP for what the gate hands on."""
    dy, d_gate = se_gate_backward(grad, block.mlp(x, weights, Branch()), gate)
    dx, d_weights = block.mlp_backward(dy, x, weights)
    return dx, d_weights, d_gate
