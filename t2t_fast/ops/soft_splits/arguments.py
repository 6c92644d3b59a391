"""The arguments that travel together from a public function to its implementations."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """Height and width of the windows, the steps between them, and the zeros on each side."""

    kernel_size: Pair
    stride: Pair
    padding: Pair


class Norm(NamedTuple):
    """A LayerNorm: gamma (n,), beta (n,) and its epsilon.

    Without gamma the LayerNorm is folded: the Linear behind it holds gamma and beta, and its rows have the mean 0.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Split(NamedTuple):
    """What lies in front of a Linear: windows of an image, or of a token ``grid`` (H, W), and a LayerNorm or None."""

    geometry: Geometry
    grid: Pair | None
    norm: Norm | None
