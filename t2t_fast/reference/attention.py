"""Softmax attention, the N x N matrix written out (paper §3.1 and §3.2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float) -> Tensor:
    """``dropout(softmax(scale q kᵀ)) v`` for (B, heads, N, D) each."""
    attn = (q @ k.transpose(-2, -1)) * scale
    attn = F.dropout(attn.softmax(dim=-1), dropout_p)
    return attn @ v


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (q, k, v) without dropout.

    With P = softmax(scale q kᵀ): ``dv = Pᵀ dy``, ``dP = dy vᵀ``, ``dS = scale P (dP - Σ_j P dP)``,
    ``dq = dS k``, ``dk = dSᵀ q``.
    """
    attn = ((q @ k.transpose(-2, -1)) * scale).softmax(dim=-1)
    d_attn = grad @ v.transpose(-2, -1)
    d_scores = scale * attn * (d_attn - (attn * d_attn).sum(-1, keepdim=True))
    return d_scores @ k, d_scores.transpose(-2, -1) @ q, attn.transpose(-2, -1) @ grad
