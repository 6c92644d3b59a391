"""Softmax attention, for the token transformer and the backbone's blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..aten import attention as aten_attention
from ..checks import check_alike, check_probability, check_real, check_shape, check_tensor
from ..dispatch import Implementation, Op
from ..reference import attention as reference_attention
from .common.autograd import forward_mode, wants_gradient


def _aten_can_run(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> str | None:
    if torch.compiler.is_compiling():
        return None
    if forward_mode():
        return "scaled_dot_product_attention has no forward-mode derivative"
    if torch._C._are_functorch_transforms_active() and wants_gradient(q, k, v):
        return "scaled_dot_product_attention has no second derivative and no batched gradient for torch.func"
    return None


_OP = Op(
    "attention",
    (
        Implementation("aten", aten_attention.forward, _aten_can_run),
        Implementation("reference", reference_attention.forward),
    ),
)


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float = 0.0, *, backend: str = "auto"
) -> Tensor:
    """``dropout(softmax(scale q kᵀ)) v`` (paper §3.2).

    Args:
        q: Queries (B, heads, N, D).
        k: Keys (B, heads, N, D).
        v: Values (B, heads, N, D).
        scale: Factor on the scores: a multiplier, usually ``D**-0.5``.
        dropout_p: Dropout on the attention weights; pass 0 in evaluation.
        backend: See :mod:`t2t_fast.ops`.

    Returns:
        (B, heads, N, D).

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes do not fit together, or ``dropout_p`` is outside [0, 1).
        BackendUnavailable: ``backend`` names one that cannot run here.
    """
    check_tensor("q", q, 4)
    check_shape("k", k, q.shape, "the shape of q")
    check_shape("v", v, q.shape, "the shape of q")
    check_alike("q", q, ("k", k), ("v", v))
    check_probability("dropout_p", dropout_p)
    return _OP(backend, q, k, v, check_real("scale", scale), dropout_p)
