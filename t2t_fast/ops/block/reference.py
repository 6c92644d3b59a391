"""The definitions: Linear, MLP, LayerNorm and Linear, residual sum and LayerNorm (paper §3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.branch import Branch, add_branch
from ..common.derivatives import gelu_slope, standardize, standardize_backward
from ..common.norm import Norm
from .arguments import MlpWeights


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """(B, N, C) to (B, N, out)."""
    y = F.linear(x, weight, bias)
    return F.gelu(y) if gelu else y


def mlp(x: Tensor, weights: MlpWeights, branch: Branch) -> Tensor:
    """``fc2(gelu(fc1(x)))`` with the exact (erf) GELU: (B, N, C) to (B, N, out)."""
    hidden = F.gelu(F.linear(x, weights.fc1_weight, weights.fc1_bias))
    return add_branch(F.linear(hidden, weights.fc2_weight, weights.fc2_bias), branch)


def mlp_backward(grad: Tensor, x: Tensor, weights: MlpWeights) -> tuple[Tensor, MlpWeights]:
    """Gradients of x and of the weights, without a residual.

    With a = W1 x + b1, h = gelu(a) and y = W2 h + b2::

        da = (W2ᵀ dy) gelu'(a)      dx = W1ᵀ da
        dW1 = Σ da xᵀ      db1 = Σ da      dW2 = Σ dy hᵀ      db2 = Σ dy
    """
    a = F.linear(x, weights.fc1_weight, weights.fc1_bias)
    da = (grad @ weights.fc2_weight) * gelu_slope(a)
    return da @ weights.fc1_weight, MlpWeights(
        torch.einsum("bnh,bnc->hc", da, x),
        None if weights.fc1_bias is None else da.sum((0, 1)),
        torch.einsum("bnc,bnh->ch", grad, F.gelu(a)),
        None if weights.fc2_bias is None else grad.sum((0, 1)),
    )


def layer_norm(x: Tensor, norm: Norm) -> Tensor:
    """LayerNorm over the channels."""
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def layer_norm_linear(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm, gelu: bool = False) -> Tensor:
    """LayerNorm, Linear and, if wanted, GELU in a row, as every branch of a block begins: (B, N, C) to (B, N, out)."""
    return linear(layer_norm(x, norm), weight, bias, gelu)


def layer_norm_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm, gelu: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias, and the LayerNorm's weight and bias.

    With z = (x - mean) rstd, n = gamma z + beta, a = W n + b and y = gelu(a)::

        da = dy gelu'(a)      dW = Σ da nᵀ      db = Σ da      dn = Wᵀ da      dgamma = Σ dn z      dbeta = Σ dn
        dz = gamma dn         dx = rstd (dz - mean(dz) - z mean(z dz))
    """
    z, rstd = standardize(x, norm.eps)
    n = z if norm.weight is None else z * norm.weight
    n = n if norm.bias is None else n + norm.bias
    if gelu:
        grad = grad * gelu_slope(F.linear(n, weight, bias))
    dn = grad @ weight
    dz = dn if norm.weight is None else dn * norm.weight
    return (
        standardize_backward(dz, z, rstd),
        torch.einsum("bno,bnc->oc", grad, n),
        None if bias is None else grad.sum((0, 1)),
        None if norm.weight is None else (dn * z).sum((0, 1)),
        None if norm.bias is None else dn.sum((0, 1)),
    )


def add_layer_norm(x: Tensor, y: Tensor, norm: Norm, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """``x + scale * y`` and its LayerNorm, both (B, N, C) in the dtype of the sum."""
    total = add_branch(y, Branch(x, scale))
    return total, layer_norm(total, norm).to(total.dtype)


def add_layer_norm_backward(
    d_total: Tensor, d_normed: Tensor, x: Tensor, y: Tensor, norm: Norm, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, y, and the LayerNorm's weight and bias.

    With s = x + scale y and z = (s - mean) rstd::

        dz = gamma dn       ds = dt + rstd (dz - mean(dz) - z mean(z dz))       dx = ds       dy = scale ds
    """
    z, rstd = standardize(add_branch(y, Branch(x, scale)), norm.eps)
    dz = d_normed if norm.weight is None else d_normed * norm.weight
    ds = d_total + standardize_backward(dz, z, rstd)
    return (
        ds,
        ds if scale is None else ds * scale[:, None, None],
        None if norm.weight is None else (d_normed * z).sum((0, 1)),
        None if norm.bias is None else d_normed.sum((0, 1)),
    )
