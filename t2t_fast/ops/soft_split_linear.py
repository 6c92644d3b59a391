"""Soft split, LayerNorm and Linear in one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..aten import soft_split_linear as aten_soft_split_linear
from ..checks import check_alike, check_epsilon, check_flag, check_shape, check_tensor
from ..dispatch import Implementation, Op
from ..reference import soft_split_linear as reference_soft_split_linear
from ..triton import soft_split_linear as triton_soft_split_linear
from .soft_split import check_soft_split

_OP = Op(
    "soft_split_linear",
    (
        Implementation(
            "triton",
            triton_soft_split_linear.forward,
            triton_soft_split_linear.why_not,
            triton_soft_split_linear.why_not_auto,
        ),
        Implementation("aten", aten_soft_split_linear.forward),
        Implementation("reference", reference_soft_split_linear.forward),
    ),
)


def soft_split_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    grid: Sequence[int] | None = None,
    eps: float = 1e-5,
    *,
    folded: bool = False,
    backend: str = "auto",
) -> Tensor:
    """``linear(layer_norm(soft_split(x)))`` (paper §3.1), without the long tokens where the backend can.

    Args:
        x: Image (B, C, H, W) or tokens (B, H*W, C) with ``grid=(H, W)``, as for :func:`soft_split`.
        weight: (out, n) with n = C*kh*kw, columns in the order (c, i, j).
        bias: (out,) or None.
        norm_weight: LayerNorm's gamma (n,), or None for no LayerNorm, unless ``folded``.
        norm_bias: LayerNorm's beta (n,) or None; None without ``norm_weight``.
        kernel_size: Patch height and width in pixels, an int or a pair.
        stride: Step between patches, an int or a pair.
        padding: Zeros on each side, an int or a pair; they count in the LayerNorm's statistics.
        grid: (H, W) of the token grid; None for an image.
        eps: LayerNorm's epsilon.
        folded: There is a LayerNorm, without weights of its own: ``weight``, whose rows have the mean 0, and ``bias``
            hold them already, as :func:`t2t_fast.freeze` makes them. For inference: such weights get no gradient.
        backend: See :mod:`t2t_fast.ops`.

    Returns:
        (B, L, out), in the dtype that a Linear would return.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes do not fit together; or ``folded`` with ``norm_weight``, or with a ``weight`` to be trained.
        BackendUnavailable: ``backend`` names one that cannot run here.
    """
    checked = check_soft_split_linear(x, weight, bias, norm_weight, norm_bias, kernel_size, stride, padding, grid)
    check_folded(folded, weight, norm_weight)
    return _OP(backend, *checked, check_epsilon("eps", eps), folded)


def check_soft_split_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    grid: Sequence[int] | None,
    linear: str = "",
    norm: str = "norm_",
) -> tuple[Any, ...]:
    """The implementations' arguments up to eps; ``linear`` and ``norm`` are how their weights' names begin."""
    geometry, grid_ = check_soft_split(x, kernel_size, stride, padding, grid)
    kernel = geometry[0]
    channels = x.shape[1] if grid_ is None else x.shape[2]
    n = channels * kernel[0] * kernel[1]
    check_tensor(f"{linear}weight", weight, 2)
    check_shape(f"{linear}weight", weight, (weight.shape[0], n), "(out, C*kh*kw)")
    if bias is not None:
        check_shape(f"{linear}bias", bias, (weight.shape[0],), "(out,)")
    if norm_weight is not None:
        check_shape(f"{norm}weight", norm_weight, (n,), "(C*kh*kw,)")
    if norm_bias is not None:
        if norm_weight is None:
            raise ValueError(f"{norm}bias was given without {norm}weight; pass both, {norm}weight alone, or neither")
        check_shape(f"{norm}bias", norm_bias, (n,), "(C*kh*kw,)")
    check_alike(
        "x",
        x,
        (f"{linear}weight", weight),
        (f"{linear}bias", bias),
        (f"{norm}weight", norm_weight),
        (f"{norm}bias", norm_bias),
    )
    return x, weight, bias, norm_weight, norm_bias, *geometry, grid_


def check_folded(
    folded: bool, weight: Tensor, norm_weight: Tensor | None, linear: str = "", norm: str = "norm_"
) -> None:
    """Raise if ``folded`` and the other two contradict each other; names as for :func:`check_soft_split_linear`."""
    check_flag("folded", folded)
    if folded and norm_weight is not None:
        raise ValueError(f"folded=True says that {linear}weight holds {norm}weight already; pass {norm}weight=None")
    if folded and weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"folded=True is for inference, and {linear}weight requires a gradient; pass the LayerNorm's weights, or "
            "call it under torch.no_grad()"
        )
