"""Softmax attention, the N x N matrix written out (paper §3.1 and §3.2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..numerics import compute_dtype, no_autocast, product_dtype


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float) -> Tensor:
    """``dropout(softmax(scale q kᵀ)) v`` for (B, heads, N, D) each, computed in float32 or better."""
    dtype, out_dtype = compute_dtype(q, k, v), product_dtype(v)
    with no_autocast(q):
        attn = (q.to(dtype) @ k.to(dtype).transpose(-2, -1)) * scale
        attn = F.dropout(attn.softmax(dim=-1), dropout_p)
        return (attn @ v.to(dtype)).to(out_dtype)


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (q, k, v) without dropout.

    With P = softmax(scale q kᵀ): ``dv = Pᵀ dy``, ``dP = dy vᵀ``, ``dS = scale P (dP - Σ_j P dP)``,
    ``dq = dS k``, ``dk = dSᵀ q``.
    """
    attn = ((q @ k.transpose(-2, -1)) * scale).softmax(dim=-1)
    d_attn = grad @ v.transpose(-2, -1)
    d_scores = scale * attn * (d_attn - (attn * d_attn).sum(-1, keepdim=True))
    return d_scores @ k, d_scores.transpose(-2, -1) @ q, attn.transpose(-2, -1) @ grad
