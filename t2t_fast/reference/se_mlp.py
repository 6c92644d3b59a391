"""The SE-augmented MLP: ``se_gate(fc2(gelu(fc1(x))))``, the gate taken from the token mean of the MLP's output."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import se_gate


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
    y = F.linear(F.gelu(F.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
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
    """Gradients of all seven tensors; ``gelu'(a) = Phi(a) + a exp(-a²/2) / sqrt(2 pi)``."""
    a = F.linear(x, fc1_weight, fc1_bias)
    h = F.gelu(a)
    y = F.linear(h, fc2_weight, fc2_bias)
    dy, d_reduce, d_expand = se_gate.backward(grad, y, w_reduce, w_expand)
    gelu_slope = torch.special.ndtr(a) + a * torch.exp(-a * a / 2) / math.sqrt(2 * math.pi)
    da = (dy @ fc2_weight) * gelu_slope
    d_fc1_weight = torch.einsum("bnh,bnc->hc", da, x)
    d_fc2_weight = torch.einsum("bnc,bnh->ch", dy, h)
    d_fc1_bias = None if fc1_bias is None else da.sum((0, 1))
    d_fc2_bias = None if fc2_bias is None else dy.sum((0, 1))
    return da @ fc1_weight, d_fc1_weight, d_fc1_bias, d_fc2_weight, d_fc2_bias, d_reduce, d_expand
