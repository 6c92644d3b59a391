"""Soft split as one copy through a strided view of the windows, where unfold needs a copy and a transpose."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.common.autograd import is_exporting
from ..reference.soft_split import as_image

Pair = tuple[int, int]


def forward(x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, grid: Pair | None) -> Tensor:
    """Tokens (B, L, C*kh*kw), contiguous."""
    image = as_image(x, grid)
    if any(padding):
        image = F.pad(image, (padding[1], padding[1], padding[0], padding[0]))
    rows = windows(image, 2, kernel_size[0], stride[0])
    patches = windows(rows, 3, kernel_size[1], stride[1])  # (B, C, h, w, kh, kw)
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def windows(x: Tensor, dim: int, size: int, step: int) -> Tensor:
    """``x.unfold(dim, size, step)``: the windows along ``dim``, their values in a new last dimension.

    Exported and traced graphs get slices: ONNX has no such view, and nothing can be told of its strides where sizes are
    open.
    """
    if torch.jit.is_tracing():
        span = (x.shape[dim] - size) // step * step + 1
        return torch.stack([x[(slice(None),) * dim + (slice(i, i + span, step),)] for i in range(size)], dim=-1)
    views = x.unfold(dim, size, step)
    return views.clone(memory_format=torch.contiguous_format) if is_exporting() else views
