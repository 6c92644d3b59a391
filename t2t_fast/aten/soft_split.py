"""Soft split as one copy through a strided view of the windows, where unfold needs a copy and a transpose."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..reference.soft_split import as_image

Pair = tuple[int, int]


def forward(x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, grid: Pair | None) -> Tensor:
    """Tokens (B, L, C*kh*kw), contiguous."""
    image = as_image(x, grid)
    if any(padding):
        image = F.pad(image, (padding[1], padding[1], padding[0], padding[0]))
    windows = image.unfold(2, kernel_size[0], stride[0]).unfold(3, kernel_size[1], stride[1])  # (B, C, h, w, kh, kw)
    return windows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
