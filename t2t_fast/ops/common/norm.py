"""A LayerNorm's arguments, as the implementations of several families take them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Norm(NamedTuple):
    """A LayerNorm: gamma, or None for ones; beta, or None for zeros; what is added to the variance."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
