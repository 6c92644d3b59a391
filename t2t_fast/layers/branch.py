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


def add_branch(x: Tensor, branch: nn.Module, norm: nn.Module, drop_path: nn.Module | None = None) -> Tensor:
    """``x + drop_path(branch(norm(x)))``; a branch that can adds ``x`` in the last of its own passes.

    Not where somebody watches the branch, or ``drop_path`` is a module of another kind.
    """
    return _finish(x, branch, drop_path, *_prepare(x, branch, norm))


def add_two_branches(
    x: Tensor,
    first: Any,
    first_norm: nn.Module,
    second: nn.Module,
    second_norm: nn.Module,
    drop_path: nn.Module,
) -> Tensor:
    """Two :func:`add_branch` in a row, with the sum and the norm in between as one op where that is the same."""
    norm: Any = second_norm
    if _adds_residual(first, drop_path) or not (_is_known(drop_path) and are_plain(norm)):
        return add_branch(add_branch(x, first, first_norm, drop_path), second, norm, drop_path)
    y, options = _prepare(x, first, first_norm)
    scale = drop_path_scale(drop_path, x)
    y, backend = first(y, **options), getattr(first, "backend", "auto")
    x, y = add_layer_norm(x, y, norm.weight, norm.bias, eps=norm.eps, branch_scale=scale, backend=backend)
    return _finish(x, second, drop_path, y, {})


def _prepare(x: Tensor, branch: Any, norm: nn.Module) -> tuple[Tensor, dict[str, Any]]:
    """What the branch is called with: one that ``takes_norm`` gets a plain norm, for its first product to apply."""
    if getattr(branch, "takes_norm", False) and are_plain(norm) and not is_watched(branch):
        return x, {"norm": norm}
    return apply_norm(x, norm), {}


def _finish(x: Tensor, branch: nn.Module, drop_path: nn.Module | None, y: Tensor, options: dict[str, Any]) -> Tensor:
    if _adds_residual(branch, drop_path):
        return branch(y, residual=x, branch_scale=drop_path_scale(drop_path, x), **options)
    y = branch(y, **options)
    return x + (y if drop_path is None else drop_path(y))


def _adds_residual(branch: nn.Module, drop_path: nn.Module | None) -> bool:
    return _is_known(drop_path) and not is_watched(branch) and bool(getattr(branch, "adds_residual", False))


def _is_known(drop_path: nn.Module | None) -> bool:
    return drop_path is None or (type(drop_path) in (nn.Identity, DropPath) and not is_watched(drop_path))


def drop_path_scale(drop_path: nn.Module | None, x: Tensor) -> Tensor | None:
    """What ``drop_path`` multiplies each image's branch by, (B,), or None for nothing: the same random numbers."""
    if not isinstance(drop_path, DropPath) or not drop_path.training or drop_path.drop_prob == 0:
        return None
    keep = 1 - drop_path.drop_prob
    scale = x.new_empty(x.shape[0]).bernoulli_(keep)
    return scale / keep if keep > 0 and drop_path.scale_by_keep else scale
