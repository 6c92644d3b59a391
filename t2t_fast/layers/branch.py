"""Residual branches and stochastic depth."""

from __future__ import annotations

from timm.layers import DropPath
from torch import Tensor, nn


def add_branch(x: Tensor, branch: nn.Module, y: Tensor, drop_path: nn.Module | None = None) -> Tensor:
    """``x + drop_path(branch(y))``; a branch that can adds ``x`` in the last of its own passes.

    Not where a forward hook wants to see what the branch alone returns, or ``drop_path`` is a module of another kind.
    """
    known = drop_path is None or type(drop_path) in (nn.Identity, DropPath)
    if known and getattr(branch, "adds_residual", False) and not branch._forward_hooks:
        return branch(y, residual=x, branch_scale=drop_path_scale(drop_path, x))
    y = branch(y)
    return x + (y if drop_path is None else drop_path(y))


def drop_path_scale(drop_path: nn.Module | None, x: Tensor) -> Tensor | None:
    """What ``drop_path`` multiplies each image's branch by, (B,), or None for nothing: the same random numbers."""
    if not isinstance(drop_path, DropPath) or not drop_path.training or drop_path.drop_prob == 0:
        return None
    keep = 1 - drop_path.drop_prob
    scale = x.new_empty(x.shape[0]).bernoulli_(keep)
    return scale / keep if keep > 0 and drop_path.scale_by_keep else scale
