"""The SE-augmented MLP."""

from __future__ import annotations

from torch import Tensor

from ..aten import se_mlp as aten_se_mlp
from ..dispatch import Implementation, Op
from ..native import se_mlp as native_se_mlp
from ..reference import se_mlp as reference_se_mlp
from .common.branch import check_branch
from .mlp import check_mlp
from .se_gate import check_se_weights

_OP = Op(
    "se_mlp",
    (
        Implementation("native", native_se_mlp.forward, native_se_mlp.why_not, native_se_mlp.why_not_auto),
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
    check_mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    check_se_weights(x, fc2_weight.shape[0], w_reduce, w_expand)
    check_branch("x", x, (*x.shape[:2], fc2_weight.shape[0]), residual, branch_scale)
    return _OP(backend, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, w_reduce, w_expand, residual, branch_scale)
