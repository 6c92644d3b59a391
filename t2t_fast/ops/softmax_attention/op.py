"""Softmax attention, for the token transformer and the backbone's blocks."""

from __future__ import annotations

from torch import Tensor

from ...checks import check_alike, check_probability, check_real, check_shape, check_tensor
from ...dispatch import Implementation, Op
from . import aten, native, reference

_ATTENTION = Op(
    "attention",
    (
        Implementation("native", native.attention, native.why_not_attention, native.why_not_auto_attention),
        Implementation("aten", aten.attention, aten.why_not_attention),
        Implementation("reference", reference.attention),
    ),
)


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float = 0.0, *, backend: str = "auto"
) -> Tensor:
    """``dropout(softmax(scale q kᵀ)) v`` (paper §3.2).

    Args:
        q: Queries (B, heads, M, D), of all tokens or of some.
        k: Keys (B, heads, N, D).
        v: Values (B, heads, N, D).
        scale: Factor on the scores: a multiplier, usually ``D**-0.5``.
        dropout_p: Dropout on the attention weights; pass 0 in evaluation.
        backend: See :mod:`t2t_fast.ops`.

    Returns:
        (B, heads, M, D).

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes do not fit together, or ``dropout_p`` is outside [0, 1).
        BackendUnavailable: ``backend`` names one that cannot run here.
    """
    check_tensor("q", q, 4)
    check_tensor("k", k, 4)
    check_shape("k", k, (*q.shape[:2], k.shape[2], q.shape[3]), "that of q, but for the number of tokens,")
    check_shape("v", v, k.shape, "the shape of k")
    check_alike("q", q, ("k", k), ("v", v))
    check_probability("dropout_p", dropout_p)
    return _ATTENTION(backend, q, k, v, check_real("scale", scale), dropout_p)
