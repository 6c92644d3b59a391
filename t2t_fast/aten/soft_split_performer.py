"""A soft split and its Performer token layer, one after the other."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import soft_split_linear, token_performer


def forward(split: tuple[Any, ...], layer: tuple[Any, ...]) -> Tensor:
    """The arguments of soft_split_linear, and those of token_performer behind its first; returns (B, L, E)."""
    return token_performer.forward(soft_split_linear.forward(*split), *layer)
