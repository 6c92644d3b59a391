"""The arguments that travel together from a public function to its implementations."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MlpWeights(NamedTuple):
    """The weights of an MLP, or their gradients."""

    fc1_weight: Tensor  # (hidden, C)
    fc1_bias: Tensor | None  # (hidden,)
    fc2_weight: Tensor  # (out, hidden)
    fc2_bias: Tensor | None  # (out,)
