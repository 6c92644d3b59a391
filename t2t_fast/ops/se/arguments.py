"""The arguments that travel together from a public function to its implementations."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class GateWeights(NamedTuple):
    """The two Linears of a gate over C channels, or their gradients."""

    w_reduce: Tensor  # (R, C)
    w_expand: Tensor  # (C, R)
