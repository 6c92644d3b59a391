"""A Linear with what follows it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..aten import linear as aten_linear
from ..checks import check_alike, check_flag, check_shape, check_tensor
from ..dispatch import Implementation, Op
from ..reference import linear as reference_linear

_OP = Op(
    "linear",
    (
        Implementation("aten", aten_linear.forward, detail=aten_linear.detail),
        Implementation("reference", reference_linear.forward),
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
    return _OP(backend, x, weight, bias, gelu)


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
