"""Soft split, LayerNorm and Linear in a row: the entry of a token layer (paper §3.1) and its final projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.common.derivatives import standardize, standardize_backward
from . import soft_split

Pair = tuple[int, int]


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    grid: Pair | None,
    eps: float,
    folded: bool = False,
) -> Tensor:
    """``Linear(LayerNorm(soft_split(x)))``, (B, L, out); no LayerNorm without ``norm_weight``, unless ``folded``."""
    patches = soft_split.forward(x, kernel_size, stride, padding, grid)
    if folded or norm_weight is not None:
        patches = F.layer_norm(patches, (patches.shape[-1],), norm_weight, norm_bias, eps)
    return F.linear(patches, weight, bias)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    grid: Pair | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (x, weight, bias, norm_weight, norm_bias), None for an argument that is None.

    With u a patch of n values, z = (u - mean(u)) * rstd, a = gamma z + beta and out = W a + b::

        da = Wᵀ dout      dW = Σ dout aᵀ      db = Σ dout      dgamma = Σ da z      dbeta = Σ da
        dz = gamma da     du = rstd (dz - mean(dz) - z mean(z dz))     dx = fold(du)
    """
    u = soft_split.forward(x, kernel_size, stride, padding, grid)
    d_normed = grad @ weight
    d_norm_weight = d_norm_bias = None
    if norm_weight is None:
        normed, du = u, d_normed
    else:
        z, rstd = standardize(u, eps)
        normed = z * norm_weight if norm_bias is None else z * norm_weight + norm_bias
        dz = d_normed * norm_weight
        du = standardize_backward(dz, z, rstd)
        d_norm_weight = (d_normed * z).sum((0, 1))
        d_norm_bias = None if norm_bias is None else d_normed.sum((0, 1))
    d_weight = torch.einsum("blo,bln->on", grad, normed)
    d_bias = None if bias is None else grad.sum((0, 1))
    dx = soft_split.backward(du, tuple(x.shape), kernel_size, stride, padding, grid)
    return dx, d_weight, d_bias, d_norm_weight, d_norm_bias
