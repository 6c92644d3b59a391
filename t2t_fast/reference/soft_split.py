"""Soft split (paper §3.1): reshape tokens to an image, cut it into overlapping patches, flatten each to a token."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def window_grid(size: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Pair:
    """Rows and columns of windows that fit on an image of ``size`` (H, W)."""
    height, width = ((n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel_size, stride, padding, strict=True))
    return height, width


def as_image(x: Tensor, grid: Pair | None) -> Tensor:
    """``x`` as an image (B, C, H, W): itself, or tokens (B, H*W, C) laid out on ``grid`` = (H, W)."""
    return x if grid is None else x.transpose(1, 2).view(x.shape[0], x.shape[2], *grid)


def forward(x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, grid: Pair | None) -> Tensor:
    """Tokens (B, L, C*kh*kw), features in the order (c, i, j)."""
    return F.unfold(as_image(x, grid), kernel_size, padding=padding, stride=stride).transpose(1, 2)


def backward(
    grad: Tensor, shape: tuple[int, ...], kernel_size: Pair, stride: Pair, padding: Pair, grid: Pair | None
) -> Tensor:
    """Gradient of ``x`` of shape ``shape``: every input element sums the windows that cover it."""
    size = (shape[2], shape[3]) if grid is None else grid
    image = F.fold(grad.transpose(1, 2), size, kernel_size, padding=padding, stride=stride)
    return image if grid is None else image.flatten(2).transpose(1, 2)
