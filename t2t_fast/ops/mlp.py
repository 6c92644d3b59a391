"""The MLP of the backbone's blocks and of the token transformer."""

from __future__ import annotations

from torch import Tensor

from ..aten import linear as aten_linear
from ..aten import mlp as aten_mlp
from ..checks import check_tensor
from ..dispatch import Implementation, Op
from ..reference import mlp as reference_mlp
from .common.branch import check_branch
from .linear import check_linear

_OP = Op(
    "mlp",
    (
        Implementation("aten", aten_mlp.forward, detail=aten_linear.detail),
        Implementation("reference", reference_mlp.forward),
    ),
)


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    branch_scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``fc2(gelu(fc1(x)))`` with the exact (erf) GELU (paper §3.2).

    With ``residual`` and ``branch_scale``, the end of a residual branch: ``residual + branch_scale * mlp(x)``.

    Args:
        x: Tokens (B, N, C).
        fc1_weight: (hidden, C).
        fc1_bias: (hidden,) or None.
        fc2_weight: (out, hidden).
        fc2_bias: (out,) or None.
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
    check_branch("x", x, (*x.shape[:2], fc2_weight.shape[0]), residual, branch_scale)
    return _OP(backend, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, branch_scale)


def check_mlp(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None
) -> None:
    """Raise unless tokens and weights fit together."""
    check_tensor("x", x, 3)
    check_linear("fc1_weight", fc1_weight, "fc1_bias", fc1_bias, x)
    check_linear("fc2_weight", fc2_weight, "fc2_bias", fc2_bias, x, fc1_weight.shape[0])
