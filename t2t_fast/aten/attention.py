"""Softmax attention through ``scaled_dot_product_attention``: the N x N matrix is never stored."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float) -> Tensor:
    """(B, heads, N, D) each; returns the same shape."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)
