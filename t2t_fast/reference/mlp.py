"""The blocks' MLP: ``fc2(gelu(fc1(x)))`` with the exact (erf) GELU (paper §3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.common.branch import add_branch
from ..ops.common.derivatives import gelu_slope


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
    y = F.linear(F.gelu(F.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
    return add_branch(y, residual, branch_scale)


def backward(
    grad: Tensor,
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """Gradients of the five tensors."""
    a = F.linear(x, fc1_weight, fc1_bias)
    da = (grad @ fc2_weight) * gelu_slope(a)
    d_fc1_weight = torch.einsum("bnh,bnc->hc", da, x)
    d_fc2_weight = torch.einsum("bnc,bnh->ch", grad, F.gelu(a))
    d_fc1_bias = None if fc1_bias is None else da.sum((0, 1))
    d_fc2_bias = None if fc2_bias is None else grad.sum((0, 1))
    return da @ fc1_weight, d_fc1_weight, d_fc1_bias, d_fc2_weight, d_fc2_bias
