"""Squeeze-and-excitation over tokens (paper §3.3, "SE"; arXiv 1709.01507): scale channels by a gate of their mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import compute_dtype, no_autocast
from ..ops.common.branch import add_branch


def gate(mean: Tensor, w_reduce: Tensor, w_expand: Tensor) -> Tensor:
    """``sigmoid(W_expand relu(W_reduce mean))`` for (B, C) in float32 or better."""
    return torch.sigmoid(F.linear(F.relu(F.linear(mean, w_reduce)), w_expand))


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
        mean = F.adaptive_avg_pool1d(x.transpose(1, 2).to(dtype), 1).squeeze(2)
        y = (x * gate(mean, w_reduce.to(dtype), w_expand.to(dtype)).unsqueeze(1)).to(x.dtype)
        return add_branch(y, residual, branch_scale)


def backward(grad: Tensor, x: Tensor, w_reduce: Tensor, w_expand: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (x, w_reduce, w_expand).

    With s = mean(x), h = relu(W_r s) and g = sigmoid(W_e h)::

        dg = Σ_tokens dy x      dz = dg g (1 - g)      dh = (W_eᵀ dz) [h > 0]
        dW_e = Σ dz hᵀ          dW_r = Σ dh sᵀ         dx = dy g + W_rᵀ dh / N
    """
    mean = x.mean(dim=1)
    hidden = F.relu(F.linear(mean, w_reduce))
    g = torch.sigmoid(F.linear(hidden, w_expand))
    dz = (grad * x).sum(dim=1) * g * (1 - g)
    d_hidden = (dz @ w_expand) * (hidden > 0)
    dx = grad * g.unsqueeze(1) + (d_hidden @ w_reduce).unsqueeze(1) / x.shape[1]
    return dx, d_hidden.T @ mean, dz.T @ hidden
