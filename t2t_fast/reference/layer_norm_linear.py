"""LayerNorm, Linear and, if wanted, GELU in a row: how every branch of a block begins (paper §3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.common.derivatives import gelu_slope, standardize, standardize_backward
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


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    gelu: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the five tensors.

    With z = (x - mean) rstd, n = gamma z + beta, a = W n + b and y = gelu(a)::

        da = dy gelu'(a)      dW = Σ da nᵀ      db = Σ da      dn = Wᵀ da      dgamma = Σ dn z      dbeta = Σ dn
        dz = gamma dn         dx = rstd (dz - mean(dz) - z mean(z dz))
    """
    z, rstd = standardize(x, eps)
    n = z if norm_weight is None else z * norm_weight
    n = n if norm_bias is None else n + norm_bias
    if gelu:
        a = F.linear(n, weight, bias)
        grad = grad * gelu_slope(a)
    dn = grad @ weight
    dz = dn if norm_weight is None else dn * norm_weight
    return (
        standardize_backward(dz, z, rstd),
        torch.einsum("bno,bnc->oc", grad, n),
        None if bias is None else grad.sum((0, 1)),
        None if norm_weight is None else (dn * z).sum((0, 1)),
        None if norm_bias is None else dn.sum((0, 1)),
    )
