"""A Linear with what follows it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """(B, N, C) to (B, N, out)."""
    y = F.linear(x, weight, bias)
    return F.gelu(y) if gelu else y
