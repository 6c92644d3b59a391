"""Squeeze-and-excitation without the two transposes of the literal form."""

from __future__ import annotations

from torch import Tensor

from ...numerics import compute_dtype, no_autocast
from ..block import aten as block
from ..block.arguments import MlpWeights
from ..common.branch import Branch, add_branch
from .arguments import GateWeights
from .reference import factors


def se_gate(x: Tensor, gate: GateWeights, branch: Branch) -> Tensor:
    """(B, N, C) to (B, N, C) in the dtype of ``x``; the gate is computed in float32 or better."""
    with no_autocast(x):
        mean = x.mean(dim=1, keepdim=True, dtype=compute_dtype(x))
        return add_branch((x * factors(mean, gate)).to(x.dtype), branch)


def se_mlp(x: Tensor, weights: MlpWeights, gate: GateWeights, branch: Branch) -> Tensor:
    """(B, N, C) to (B, N, out)."""
    return se_gate(block.mlp(x, weights, Branch()), gate, branch)
