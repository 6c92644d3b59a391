"""The arguments that travel together from a public function to its implementations."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Layer(NamedTuple):
    """The weights of a token layer on tokens of E channels, behind its first Linear.

    ``norm_weight`` is gamma, or None for ones; ``norm_bias`` is beta, or None for zeros.
    """

    w: Tensor  # random features (m, E)
    proj_weight: Tensor  # (E, E)
    proj_bias: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    fc1_weight: Tensor  # (hidden, E)
    fc1_bias: Tensor
    fc2_weight: Tensor  # (E, hidden)
    fc2_bias: Tensor


class Options(NamedTuple):
    """The numbers of a token layer: both dropouts' rates, the epsilons of the attention and of the LayerNorm."""

    proj_drop: float
    mlp_drop: float
    eps: float
    norm_eps: float


class Sums(NamedTuple):
    """What attention needs of the keys and values of an image, or of a range of its tokens.

    The formulas are in :mod:`t2t_fast.kernels.performer_attention`.
    """

    largest: Tensor  # (..., m): the largest exponent of each feature
    total: Tensor  # (..., m): the sum of the exponentials
    summary: Tensor  # (..., m, E): that of their outer products with the values
