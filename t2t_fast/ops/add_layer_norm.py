"""A residual branch's sum and its LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from ..aten import add_layer_norm as aten_add_layer_norm
from ..checks import check_epsilon, check_tensor
from ..dispatch import Implementation, Op
from ..reference import add_layer_norm as reference_add_layer_norm
from ..triton import add_layer_norm as triton_add_layer_norm
from .common.branch import check_branch
from .layer_norm_linear import check_norm

_OP = Op(
    "add_layer_norm",
    (
        Implementation(
            "triton", triton_add_layer_norm.forward, triton_add_layer_norm.why_not, triton_add_layer_norm.why_not_auto
        ),
        Implementation("aten", aten_add_layer_norm.forward),
        Implementation("reference", reference_add_layer_norm.forward),
    ),
)


def add_layer_norm(
    x: Tensor,
    y: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    eps: float = 1e-5,
    branch_scale: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``s = x + branch_scale * y`` and ``LayerNorm(s)``: where one branch of a block ends and the next begins (§3.2).

    Args:
        x: The residual (B, N, C).
        y: What the branch returns (B, N, C).
        norm_weight: The LayerNorm's weight (C,), or None for ones.
        norm_bias: The LayerNorm's bias (C,), or None for zeros.
        eps: Added to the variance.
        branch_scale: A factor per image, (B,), or None: stochastic depth's, zero for a dropped branch.
        backend: See :mod:`t2t_fast.ops`.

    Returns:
        Sum and normed sum, both (B, N, C) in the promoted dtype of ``x`` and ``y``; statistics are float32 or better.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes do not fit together.
        BackendUnavailable: ``backend`` names one that cannot run here.
    """
    check_tensor("x", x, 3)
    check_tensor("y", y, 3)
    check_branch("y", y, y.shape, x, branch_scale, residual_name="x")
    x_decides = x.dtype == torch.promote_types(x.dtype, y.dtype)
    check_norm(norm_weight, norm_bias, *((x, "x") if x_decides else (y, "y")))
    return _OP(backend, x, y, norm_weight, norm_bias, check_epsilon("eps", eps), branch_scale)
