"""The SE-augmented MLP."""

from __future__ import annotations

from torch import Tensor

from ..aten import se_mlp as aten_se_mlp
from ..checks import check_shape, check_tensor
from ..dispatch import Implementation, Op
from ..reference import se_mlp as reference_se_mlp
from .se_gate import check_se_weights

_OP = Op(
    "se_mlp",
    (
        Implementation("aten", aten_se_mlp.forward),
        Implementation("reference", reference_se_mlp.forward),
    ),
)


def se_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    w_reduce: Tensor,
    w_expand: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """``se_gate(fc2(gelu(fc1(x))), w_reduce, w_expand)`` with the exact (erf) GELU.

    Args:
        x: Tokens (B, N, C).
        fc1_weight: (hidden, C).
        fc1_bias: (hidden,) or None.
        fc2_weight: (out, hidden).
        fc2_bias: (out,) or None.
        w_reduce: (R, out), the gate's first Linear.
        w_expand: (out, R), the gate's second.
        backend: See :mod:`t2t_fast.ops`.

    Returns:
        (B, N, out).

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes do not fit together.
        BackendUnavailable: ``backend`` names one that cannot run here.
    """
    check_tensor("x", x, 3)
    check_tensor("fc1_weight", fc1_weight, 2)
    check_shape("fc1_weight", fc1_weight, (fc1_weight.shape[0], x.shape[2]), "(hidden, C)")
    check_tensor("fc2_weight", fc2_weight, 2)
    check_shape("fc2_weight", fc2_weight, (fc2_weight.shape[0], fc1_weight.shape[0]), "(out, hidden)")
    for name, bias, weight in (("fc1_bias", fc1_bias, fc1_weight), ("fc2_bias", fc2_bias, fc2_weight)):
        if bias is not None:
            check_shape(name, bias, (weight.shape[0],), f"(rows of {name.replace('bias', 'weight')},)")
    check_se_weights(fc2_weight.shape[0], w_reduce, w_expand)
    return _OP(backend, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, w_reduce, w_expand)
