"""Squeeze-and-excitation gate over tokens, alone and behind an MLP (paper §3.3)."""

from __future__ import annotations

from torch import Tensor

from ...checks import check_alike, check_shape, check_tensor
from ...dispatch import Implementation, Op
from ..block.arguments import MlpWeights
from ..block.op import check_mlp
from ..common.branch import Branch, check_branch
from . import aten, native, reference
from .arguments import GateWeights

_SE_GATE = Op(
    "se_gate",
    (
        Implementation("native", native.se_gate, native.why_not_se_gate, native.why_not_auto_se_gate),
        Implementation("aten", aten.se_gate),
        Implementation("reference", reference.se_gate),
    ),
)
_SE_MLP = Op(
    "se_mlp",
    (
        Implementation("native", native.se_mlp, native.why_not_se_mlp, native.why_not_auto_se_mlp),
        Implementation("aten", aten.se_mlp),
        Implementation("reference", reference.se_mlp),
    ),
)


def se_gate(
    x: Tensor,
    w_reduce: Tensor,
    w_expand: Tensor,
    *,
    residual: Tensor | None = None,
    branch_scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``x * sigmoid(W_expand relu(W_reduce mean_over_tokens(x)))`` (paper §3.3; arXiv 1709.01507).

    With the last two arguments, the end of a residual branch: ``residual + branch_scale * se_gate(x)``, where the
    backend can without another pass over the tokens.

    Args:
        x: Tokens (B, N, C); the mean runs over all of them, class token included.
        w_reduce: (R, C), R = C // 16 in the paper.
        w_expand: (C, R).
        residual: Added to the result: (B, N, C) or None.
        branch_scale: A factor per image, (B,), or None: stochastic depth's, zero for a dropped branch.
        backend: See :mod:`t2t_fast.ops`.

    Returns:
        (B, N, C) in the dtype of ``x``, promoted with that of ``residual``; the gate itself is computed in float32 or
        better.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes do not fit together.
        BackendUnavailable: ``backend`` names one that cannot run here.
    """
    check_tensor("x", x, 3)
    gate, branch = GateWeights(w_reduce, w_expand), Branch(residual, branch_scale)
    _check_gate(x, x.shape[2], gate)
    check_branch("x", x, x.shape, branch)
    return _SE_GATE(backend, x, gate, branch)


def se_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    w_reduce: Tensor,
    w_expand: Tensor,
    *,
    residual: Tensor | None = None,
    branch_scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``se_gate(fc2(gelu(fc1(x))), w_reduce, w_expand)`` with the exact (erf) GELU.

    With ``residual`` and ``branch_scale``, the end of a residual branch: ``residual + branch_scale * se_mlp(x)``. The
    ``native`` backend knows the gate before ``fc2`` runs, because the mean over tokens commutes with it, and writes
    the result once.

    Args:
        x: Tokens (B, N, C).
        fc1_weight: (hidden, C).
        fc1_bias: (hidden,) or None.
        fc2_weight: (out, hidden).
        fc2_bias: (out,) or None.
        w_reduce: (R, out), the gate's first Linear.
        w_expand: (out, R), the gate's second.
        residual: Added to the result: (B, N, out) or None.
        branch_scale: A factor per image, (B,), or None: stochastic depth's, zero for a dropped branch.
        backend: See :mod:`t2t_fast.ops`.

    Returns:
        (B, N, out), in the dtype that a Linear would return, promoted with that of ``residual``.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes do not fit together.
        BackendUnavailable: ``backend`` names one that cannot run here.
    """
    weights, gate = MlpWeights(fc1_weight, fc1_bias, fc2_weight, fc2_bias), GateWeights(w_reduce, w_expand)
    branch = Branch(residual, branch_scale)
    check_mlp(x, weights)
    _check_gate(x, fc2_weight.shape[0], gate)
    check_branch("x", x, (*x.shape[:2], fc2_weight.shape[0]), branch)
    return _SE_MLP(backend, x, weights, gate, branch)


def _check_gate(x: Tensor, channels: int, gate: GateWeights) -> None:
    """Raise unless the two gate weights fit ``channels`` and each other, and have the dtype of ``x``."""
    w_reduce, w_expand = gate
    check_tensor("w_reduce", w_reduce, 2)
    check_shape("w_reduce", w_reduce, (w_reduce.shape[0], channels), "(R, C)")
    check_shape("w_expand", w_expand, (channels, w_reduce.shape[0]), "(C, R)")
    check_alike("x", x, ("w_reduce", w_reduce), ("w_expand", w_expand))
