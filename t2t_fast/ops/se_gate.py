"""Squeeze-and-excitation gate over tokens."""

from __future__ import annotations

from torch import Tensor

from ..aten import se_gate as aten_se_gate
from ..checks import check_alike, check_shape, check_tensor
from ..dispatch import Implementation, Op
from ..native import se_gate as native_se_gate
from ..reference import se_gate as reference_se_gate
from .common.branch import check_branch

_OP = Op(
    "se_gate",
    (
        Implementation("native", native_se_gate.forward, native_se_gate.why_not, native_se_gate.why_not_auto),
        Implementation("aten", aten_se_gate.forward),
        Implementation("reference", reference_se_gate.forward),
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
    check_se_weights(x, x.shape[2], w_reduce, w_expand)
    check_branch("x", x, x.shape, residual, branch_scale)
    return _OP(backend, x, w_reduce, w_expand, residual, branch_scale)


def check_se_weights(x: Tensor, channels: int, w_reduce: Tensor, w_expand: Tensor) -> None:
    """Raise unless the two gate weights fit ``channels`` and each other, and have the dtype of ``x``."""
    check_tensor("w_reduce", w_reduce, 2)
    check_shape("w_reduce", w_reduce, (w_reduce.shape[0], channels), "(R, C)")
    check_shape("w_expand", w_expand, (channels, w_reduce.shape[0]), "(C, R)")
    check_alike("x", x, ("w_reduce", w_reduce), ("w_expand", w_expand))
