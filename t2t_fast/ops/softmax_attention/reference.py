"""Softmax attention, the M x N matrix written out (paper §3.1 and §3.2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...numerics import compute_dtype, no_autocast, product_dtype


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float) -> Tensor:
    """``dropout(softmax(scale q kᵀ)) v``, (B, heads, M, D), computed in float32 or better."""
    return weigh(F.dropout(scores(q, k, scale).softmax(dim=-1), dropout_p), v)


def scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """``scale q kᵀ`` (B, heads, M, N) in float32 or better, so that its softmax is."""
    dtype = compute_dtype(q, k)
    with no_autocast(q):
        return (q.to(dtype) @ k.to(dtype).transpose(-2, -1)) * scale


def weigh(attn: Tensor, v: Tensor) -> Tensor:
    """``attn v`` in the dtype of a matmul of ``v``, multiplied in float32 or better."""
    dtype = compute_dtype(attn, v)
    with no_autocast(v):
        y = attn.to(dtype) @ v.to(dtype)
    return y.to(product_dtype(v))


def attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (q, k, v) without dropout.

    With P = softmax(scale q kᵀ): ``dv = Pᵀ dy``, ``dP = dy vᵀ``, ``dS = scale P (dP - Σ_j P dP)``,
    ``dq = dS k``, ``dk = dSᵀ q``.
    """
    attn = ((q @ k.transpose(-2, -1)) * scale).softmax(dim=-1)
    d_attn = grad @ v.transpose(-2, -1)
    d_scores = scale * attn * (d_attn - (attn * d_attn).sum(-1, keepdim=True))
    return d_scores @ k, d_scores.transpose(-2, -1) @ q, attn.transpose(-2, -1) @ grad
