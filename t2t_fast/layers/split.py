"""A soft split and the Linear behind it as one op, or module by module where either must be called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import soft_split, soft_split_linear
from .plain import are_plain, has_no_weights

torch.fx.wrap("soft_split")
torch.fx.wrap("soft_split_linear")


def split_linear(
    x: Tensor,
    linear: Any,
    norm: Any,
    window: tuple[int, int, int],
    grid: tuple[int, int] | None,
    backend: str,
    folded: bool = False,
) -> Tensor:
    """``linear(norm(soft_split(x)))``, (B, L, out): one op, unless ``linear`` or ``norm`` was replaced or hooked.

    Args:
        x: Image (B, C, H, W), or tokens (B, H*W, C) with ``grid=(H, W)``.
        linear: The Linear.
        norm: The LayerNorm in between, or None.
        window: Kernel size, stride and padding.
        grid: Height and width of a token grid.
        backend: Passed to the ops.
        folded: The weights of ``norm`` are in ``linear``; see :func:`t2t_fast.ops.soft_split_linear`.
    """
    unseen = has_no_weights(norm) and not folded
    if unseen or not are_plain(linear, *(() if norm is None else (norm,))):
        tokens = soft_split(x, *window, grid=grid, backend=backend)
        return linear(tokens if norm is None else norm(tokens))
    options: dict[str, Any] = {"grid": grid, "backend": backend}
    if norm is None:
        return soft_split_linear(x, linear.weight, linear.bias, None, None, *window, **options)
    options |= {"eps": norm.eps, "folded": folded}
    return soft_split_linear(x, linear.weight, linear.bias, norm.weight, norm.bias, *window, **options)
