"""Residual branches, the norms in front of them, and stochastic depth."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ..ops import add_layer_norm
from .mlp import apply_norm
from .plain import are_plain, is_watched

torch.fx.wrap("add_layer_norm")


def run_branch(x: Tensor, y: Tensor, branch: Any, drop_path: nn.Module | None = None) -> Tensor:
    """``x + drop_path(branch(y))``; a branch that ``adds_residual`` adds ``x`` in the last of its own passes."""
    if adds_residual(branch, drop_path):
        return branch(y, residual=x, branch_scale=drop_path_scale(drop_path, x))
    y = branch(y)
    return x + (y if drop_path is None else drop_path(y))


def add_and_norm(x: Tensor, y: Tensor, norm: Any, drop_path: nn.Module, backend: str) -> tuple[Tensor, Tensor]:
    """``s = x + drop_path(y)`` and ``norm(s)``: one op, unless a module must be called."""
    if _is_drop_path(drop_path) and are_plain(norm):
        scale = drop_path_scale(drop_path, x)
        return add_layer_norm(x, y, norm.weight, norm.bias, eps=norm.eps, branch_scale=scale, backend=backend)
    x = x + drop_path(y)
    return x, apply_norm(x, norm)


def adds_residual(branch: nn.Module, drop_path: nn.Module | None) -> bool:
    """Whether ``branch`` takes ``residual`` and ``branch_scale`` in place of the sum behind it."""
    return _is_drop_path(drop_path) and not is_watched(branch) and bool(getattr(branch, "adds_residual", False))


def _is_drop_path(drop_path: nn.Module | None) -> bool:
    return drop_path is None or (type(drop_path) in (nn.Identity, DropPath) and not is_watched(drop_path))


def drop_path_scale(drop_path: nn.Module | None, x: Tensor) -> Tensor | None:
    """What ``drop_path`` multiplies each image's branch by, (B,), or None for nothing: the same random numbers."""
    if not isinstance(drop_path, DropPath) or not drop_path.training or drop_path.drop_prob == 0:
        return None
    keep = 1 - drop_path.drop_prob
    scale = x.new_empty(x.shape[0]).bernoulli_(keep)
    return scale / keep if keep > 0 and drop_path.scale_by_keep else scale
