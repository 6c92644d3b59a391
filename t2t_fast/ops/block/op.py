"""What the backbone's blocks and the token transformer compute besides attention (paper §3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import check_alike, check_epsilon, check_flag, check_shape, check_tensor
from ...dispatch import Implementation, Op
from ..common.branch import Branch, check_branch
from ..common.norm import Norm
from . import aten, reference, triton
from .arguments import MlpWeights

_LINEAR = Op(
    "linear",
    (
        Implementation("aten", aten.linear, detail=aten.describe_linear),
        Implementation("reference", reference.linear),
    ),
)
_MLP = Op(
    "mlp",
    (
        Implementation("aten", aten.mlp, detail=aten.describe_mlp),
        Implementation("reference", reference.mlp),
    ),
)
_LAYER_NORM_LINEAR = Op(
    "layer_norm_linear",
    (
        Implementation("aten", aten.layer_norm_linear, detail=aten.describe_linear),
        Implementation("reference", reference.layer_norm_linear),
    ),
)
_ADD_LAYER_NORM = Op(
    "add_layer_norm",
    (
        Implementation(
            "triton", triton.add_layer_norm, triton.why_not_add_layer_norm, triton.why_not_auto_add_layer_norm
        ),
        Implementation("aten", aten.add_layer_norm),
        Implementation("reference", reference.add_layer_norm),
    ),
)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False, backend: str = "auto"
) -> Tensor:
    """``x weightᵀ + bias``, with ``gelu`` through the exact (erf) GELU.

    Args:
        x: Tokens (B, N, C).
        weight: (out, C).
        bias: (out,) or None.
        gelu: Apply GELU to the result.
        backend: See :mod:`t2t_fast.ops`.

    Returns:
        (B, N, out).

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes do not fit together.
        BackendUnavailable: ``backend`` names one that cannot run here.
    """
    check_tensor("x", x, 3)
    check_linear("weight", weight, "bias", bias, x)
    check_flag("gelu", gelu)
    return _LINEAR(backend, x, weight, bias, gelu)


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
    weights, branch = MlpWeights(fc1_weight, fc1_bias, fc2_weight, fc2_bias), Branch(residual, branch_scale)
    check_mlp(x, weights)
    check_branch("x", x, (*x.shape[:2], fc2_weight.shape[0]), branch)
    return _MLP(backend, x, weights, branch)


def layer_norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    eps: float = 1e-5,
    gelu: bool = False,
    backend: str = "auto",
) -> Tensor:
    """``LayerNorm(x) weightᵀ + bias``, with ``gelu`` through the exact (erf) GELU (paper §3.2).

    Args:
        x: Tokens (B, N, C).
        weight: (out, C).
        bias: (out,) or None.
        norm_weight: The LayerNorm's weight (C,), or None for ones.
        norm_bias: The LayerNorm's bias (C,), or None for zeros.
        eps: Added to the variance.
        gelu: Apply GELU to the result.
        backend: See :mod:`t2t_fast.ops`.

    Returns:
        (B, N, out) in the dtype that the Linear would return.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes do not fit together.
        BackendUnavailable: ``backend`` names one that cannot run here.
    """
    check_tensor("x", x, 3)
    check_linear("weight", weight, "bias", bias, x)
    check_norm(norm_weight, norm_bias, "x", x)
    check_flag("gelu", gelu)
    norm = Norm(norm_weight, norm_bias, check_epsilon("eps", eps))
    return _LAYER_NORM_LINEAR(backend, x, weight, bias, norm, gelu)


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
    check_branch("y", y, y.shape, Branch(x, branch_scale), residual_name="x")
    x_decides = x.dtype == torch.promote_types(x.dtype, y.dtype)
    check_norm(norm_weight, norm_bias, *(("x", x) if x_decides else ("y", y)))
    norm = Norm(norm_weight, norm_bias, check_epsilon("eps", eps))
    return _ADD_LAYER_NORM(backend, x, y, norm, branch_scale)


def check_linear(
    weight_name: str,
    weight: Tensor,
    bias_name: str,
    bias: Tensor | None,
    x: Tensor,
    channels: int | torch.SymInt | None = None,
) -> None:
    """Raise unless a Linear's weight takes ``channels``, those of ``x`` if None, its bias fits, and dtypes are one."""
    channels = x.shape[2] if channels is None else channels
    check_tensor(weight_name, weight, 2)
    check_shape(weight_name, weight, (weight.shape[0], channels), f"(rows, {channels})")
    if bias is not None:
        check_shape(bias_name, bias, (weight.shape[0],), f"(rows of {weight_name},)")
    check_alike("x", x, (weight_name, weight), (bias_name, bias))


def check_mlp(x: Tensor, weights: MlpWeights) -> None:
    """Raise unless tokens and weights fit together."""
    check_tensor("x", x, 3)
    check_linear("fc1_weight", weights.fc1_weight, "fc1_bias", weights.fc1_bias, x)
    hidden = weights.fc1_weight.shape[0]
    check_linear("fc2_weight", weights.fc2_weight, "fc2_bias", weights.fc2_bias, x, hidden)


def check_norm(norm_weight: Tensor | None, norm_bias: Tensor | None, name: str, x: Tensor) -> None:
    """Raise unless a LayerNorm's parameters are for the channels of ``x``, called ``name``, and of its dtype."""
    for parameter_name, parameter in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if parameter is not None:
            check_shape(parameter_name, parameter, (x.shape[2],), "(C,)")
            check_alike(name, x, (parameter_name, parameter))
