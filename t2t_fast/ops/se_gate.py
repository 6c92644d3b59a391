"""Squeeze-and-excitation gate over tokens."""

from __future__ import annotations

from torch import Tensor

from ..aten import se_gate as aten_se_gate
from ..checks import check_shape, check_tensor
from ..dispatch import Implementation, Op
from ..reference import se_gate as reference_se_gate

_OP = Op(
    "se_gate",
    (
        Implementation("aten", aten_se_gate.forward),
        Implementation("reference", reference_se_gate.forward),
    ),
)


def se_gate(x: Tensor, w_reduce: Tensor, w_expand: Tensor, *, backend: str = "auto") -> Tensor:
    """``x * sigmoid(W_expand relu(W_reduce mean_over_tokens(x)))`` (paper §3.3; arXiv 1709.01507).

    Args:
        x: Tokens (B, N, C); the mean runs over all of them, class token included.
        w_reduce: (R, C), R = C // 16 in the paper.
        w_expand: (C, R).
        backend: See :mod:`t2t_fast.ops`.

    Returns:
        (B, N, C) in the dtype of ``x``; the gate itself is computed in float32 or better.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes do not fit together.
        BackendUnavailable: ``backend`` names one that cannot run here.
    """
    check_tensor("x", x, 3)
    check_se_weights(x.shape[2], w_reduce, w_expand)
    return _OP(backend, x, w_reduce, w_expand)


def check_se_weights(channels: int, w_reduce: Tensor, w_expand: Tensor) -> None:
    """Raise unless the two gate weights fit ``channels`` and each other."""
    check_tensor("w_reduce", w_reduce, 2)
    check_shape("w_reduce", w_reduce, (w_reduce.shape[0], channels), "(R, C)")
    check_shape("w_expand", w_expand, (channels, w_reduce.shape[0]), "(C, R)")
