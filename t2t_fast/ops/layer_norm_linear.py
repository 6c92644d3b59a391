"""LayerNorm and the Linear behind it."""

from __future__ import annotations

from torch import Tensor

from ..aten import layer_norm_linear as aten_layer_norm_linear
from ..checks import check_alike, check_epsilon, check_flag, check_shape, check_tensor
from ..dispatch import Implementation, Op
from ..reference import layer_norm_linear as reference_layer_norm_linear
from .linear import check_linear

_OP = Op(
    "layer_norm_linear",
    (
        Implementation("aten", aten_layer_norm_linear.forward, detail=aten_layer_norm_linear.detail),
        Implementation("reference", reference_layer_norm_linear.forward),
    ),
)


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
    check_norm(norm_weight, norm_bias, x)
    check_flag("gelu", gelu)
    return _OP(backend, x, weight, bias, norm_weight, norm_bias, check_epsilon("eps", eps), gelu)


def check_norm(norm_weight: Tensor | None, norm_bias: Tensor | None, x: Tensor, x_name: str = "x") -> None:
    """Raise unless a LayerNorm's parameters are for the channels of ``x``, and of its dtype."""
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if tensor is not None:
            check_shape(name, tensor, (x.shape[2],), "(C,)")
            check_alike(x_name, x, (name, tensor))
