"""The arguments that travel together from a public function to its implementations."""

from __future__ import annotations

from typing import NamedTuple

from ..common.norm import Norm

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """Height and width of the windows, the steps between them, and the zeros on each side."""

    kernel_size: Pair
    stride: Pair
    padding: Pair


class Split(NamedTuple):
    """What lies in front of a Linear: windows of an image, or of a token ``grid`` (H, W), and a LayerNorm or None.

    A LayerNorm without gamma is folded: the Linear holds gamma and beta, and the mean of each of its rows is 0.
    """

    geometry: Geometry
    grid: Pair | None
    norm: Norm | None
