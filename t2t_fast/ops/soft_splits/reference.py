"""The definitions: soft split alone, and soft split, LayerNorm and Linear in a row (paper §3.1).

A soft split reshapes tokens to an image, cuts it into overlapping windows and flattens each to a token. With LayerNorm
and Linear behind it is the entry of a token layer, and without LayerNorm the final projection.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.derivatives import standardize, standardize_backward
from .arguments import Geometry, Pair, Split


def window_grid(size: Sequence[int], geometry: Geometry) -> Pair:
    """Rows and columns of windows that fit on an image of ``size`` (H, W)."""
    height, width = ((n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, *geometry, strict=True))
    return height, width


def as_image(x: Tensor, grid: Pair | None) -> Tensor:
    """``x`` as an image (B, C, H, W): itself, or tokens (B, H*W, C) laid out on ``grid`` = (H, W)."""
    return x if grid is None else x.transpose(1, 2).view(x.shape[0], x.shape[2], *grid)


def soft_split(x: Tensor, geometry: Geometry, grid: Pair | None) -> Tensor:
    """Tokens (B, L, C*kh*kw), features in the order (c, i, j)."""
    kernel_size, stride, padding = geometry
    return F.unfold(as_image(x, grid), kernel_size, padding=padding, stride=stride).transpose(1, 2)


def soft_split_backward(grad: Tensor, shape: tuple[int, ...], geometry: Geometry, grid: Pair | None) -> Tensor:
    """Gradient of ``x`` of shape ``shape``: every input element sums the windows that cover it."""
    kernel_size, stride, padding = geometry
    size = (shape[2], shape[3]) if grid is None else grid
    image = F.fold(grad.transpose(1, 2), size, kernel_size, padding=padding, stride=stride)
    return image if grid is None else image.flatten(2).transpose(1, 2)


def soft_split_linear(x: Tensor, weight: Tensor, bias: Tensor | None, split: Split) -> Tensor:
    """``Linear(LayerNorm(soft_split(x)))``, (B, L, out)."""
    windows = soft_split(x, split.geometry, split.grid)
    if split.norm is not None:
        gamma, beta, eps = split.norm
        windows = F.layer_norm(windows, (windows.shape[-1],), gamma, beta, eps)
    return F.linear(windows, weight, bias)


def soft_split_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, split: Split
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias, gamma and beta; None for one that is None. A LayerNorm has its gamma here.

    With u a window of n values, z = (u - mean(u)) * rstd, a = gamma z + beta and out = W a + b::

        da = Wᵀ dout      dW = Σ dout aᵀ      db = Σ dout      dgamma = Σ da z      dbeta = Σ da
        dz = gamma da     du = rstd (dz - mean(dz) - z mean(z dz))     dx = fold(du)
    """
    u = soft_split(x, split.geometry, split.grid)
    d_normed = grad @ weight
    d_gamma = d_beta = None
    if split.norm is None:
        normed, du = u, d_normed
    else:
        gamma, beta, eps = split.norm
        assert gamma is not None
        z, rstd = standardize(u, eps)
        normed = z * gamma if beta is None else z * gamma + beta
        du = standardize_backward(d_normed * gamma, z, rstd)
        d_gamma = (d_normed * z).sum((0, 1))
        d_beta = None if beta is None else d_normed.sum((0, 1))
    d_weight = torch.einsum("blo,bln->on", grad, normed)
    d_bias = None if bias is None else grad.sum((0, 1))
    dx = soft_split_backward(du, tuple(x.shape), split.geometry, split.grid)
    return dx, d_weight, d_bias, d_gamma, d_beta
