"""LayerNorm and a Linear through the faster of the library's products; see :mod:`t2t_fast.aten.linear`."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from . import linear


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    gelu: bool = False,
) -> Tensor:
    """(B, N, C) to (B, N, out)."""
    return linear.forward(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), weight, bias, gelu)


def detail(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> str:
    """Which library multiplies, and why."""
    return linear.detail(x, weight, bias)
