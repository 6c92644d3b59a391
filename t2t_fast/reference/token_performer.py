"""The Performer token layer after its k, q, v projection (paper §3.1): attention, projection, skip with v, MLP."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.common.derivatives import gelu_slope, standardize, standardize_backward
from . import performer_attention


def forward(
    kqv: Tensor,
    w: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    proj_drop: float,
    mlp_drop: float,
    eps: float,
    norm_eps: float,
    attention: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor] = performer_attention.forward,
) -> Tensor:
    """(B, T, 3E) to (B, T, E); other implementations pass their own ``attention``."""
    k, q, v = kqv.chunk(3, dim=-1)
    y = F.linear(attention(k, q, v, w, eps), proj_weight, proj_bias)
    y = v + F.dropout(y, proj_drop)
    normed = F.layer_norm(y, (y.shape[-1],), norm_weight, norm_bias, norm_eps)
    hidden = F.gelu(F.linear(normed, fc1_weight, fc1_bias))
    return y + F.dropout(F.linear(hidden, fc2_weight, fc2_bias), mlp_drop)


def backward(
    grad: Tensor,
    kqv: Tensor,
    w: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    proj_drop: float,
    mlp_drop: float,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, ...]:
    """Gradients of the ten tensors, without dropout.

    With y = v + P a + b, z = LayerNorm(y), h = F1 z + b1 and out = y + F2 gelu(h) + b2::

        dh = (F2ᵀ dout) gelu'(h)      dy = dout + LayerNorm'(F1ᵀ dh)      da = Pᵀ dy      dv = dy + attention'(da)
    """
    k, q, v = kqv.chunk(3, dim=-1)
    attended = performer_attention.forward(k, q, v, w, eps)
    y = v + F.linear(attended, proj_weight, proj_bias)
    z, rstd = standardize(y, norm_eps)
    normed = z * norm_weight + norm_bias
    h = F.linear(normed, fc1_weight, fc1_bias)
    dh = (grad @ fc2_weight) * gelu_slope(h)
    d_normed = dh @ fc1_weight
    dz = d_normed * norm_weight
    dy = grad + standardize_backward(dz, z, rstd)
    dk, dq, dv, dw = performer_attention.backward(dy @ proj_weight, k, q, v, w, eps)
    return (
        torch.cat((dk, dq, dv + dy), dim=-1),
        dw,
        _outer(dy, attended),
        dy.sum((0, 1)),
        (d_normed * z).sum((0, 1)),
        d_normed.sum((0, 1)),
        _outer(dh, normed),
        dh.sum((0, 1)),
        _outer(grad, F.gelu(h)),
        grad.sum((0, 1)),
    )


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left.flatten(0, 1).T @ right.flatten(0, 1)
