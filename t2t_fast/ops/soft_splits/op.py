"""Soft split: overlapping windows of an image or of a token grid as tokens; alone, and with LayerNorm and Linear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...checks import as_pair, check_alike, check_epsilon, check_flag, check_shape, check_tensor
from ...dispatch import Implementation, Op
from ..common.norm import Norm
from . import aten, native, reference, triton
from .arguments import Geometry, Pair, Split

_SOFT_SPLIT = Op(
    "soft_split",
    (
        Implementation("triton", triton.soft_split, triton.why_not_soft_split, triton.why_not_auto_soft_split),
        Implementation("aten", aten.soft_split),
        Implementation("reference", reference.soft_split),
    ),
)
_SOFT_SPLIT_LINEAR = Op(
    "soft_split_linear",
    (
        Implementation(
            "triton",
            triton.soft_split_linear,
            triton.why_not_soft_split_linear,
            triton.why_not_auto_soft_split_linear,
        ),
        Implementation(
            "native",
            native.soft_split_linear,
            native.why_not_soft_split_linear,
            native.why_not_auto_soft_split_linear,
        ),
        Implementation("aten", aten.soft_split_linear),
        Implementation("reference", reference.soft_split_linear),
    ),
)


def soft_split(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    grid: Sequence[int] | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Cut overlapping patches and flatten each to a token (paper §3.1, "soft split").

    Args:
        x: Image (B, C, H, W) in any memory format, or tokens (B, H*W, C) with ``grid=(H, W)``; the reshape from
            tokens to image is then part of the op. float16, bfloat16, float32 or float64.
        kernel_size: Patch height and width in pixels, an int or a pair.
        stride: Step between patches, an int or a pair; smaller than ``kernel_size`` makes them overlap.
        padding: Zeros on each side, an int or a pair.
        grid: (H, W) of the token grid; None for an image.
        backend: See :mod:`t2t_fast.ops`.

    Returns:
        Tokens (B, L, C*kh*kw), features in :class:`torch.nn.Unfold` order (c, i, j), with
        ``L = h * w`` and ``h, w = output_grid((H, W), ...)``.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has an impossible value, or no window fits.
        BackendUnavailable: ``backend`` names one that cannot run here.
    """
    geometry = check_geometry(kernel_size, stride, padding)
    return _SOFT_SPLIT(backend, x, geometry, check_grid(x, geometry, grid))


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
    geometry = check_geometry(kernel_size, stride, padding)
    norm = Norm(norm_weight, norm_bias, eps)
    return _SOFT_SPLIT_LINEAR(backend, x, weight, bias, check_split(x, weight, bias, geometry, grid, norm, folded))


def output_grid(
    size: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
) -> Pair:
    """The (h, w) grid of tokens that a soft split makes of an image or grid of ``size`` (H, W)."""
    return reference.window_grid(size, check_geometry(kernel_size, stride, padding))


def check_geometry(
    kernel_size: int | Sequence[int], stride: int | Sequence[int], padding: int | Sequence[int]
) -> Geometry:
    """The three as pairs; raises as :func:`soft_split` does."""
    return Geometry(
        as_pair("kernel_size", kernel_size, 1), as_pair("stride", stride, 1), as_pair("padding", padding, 0)
    )


def check_grid(x: Tensor, geometry: Geometry, grid: Sequence[int] | None) -> Pair | None:
    """``grid`` as a pair; raises as :func:`soft_split` does unless ``x`` is laid out so and a window fits on it."""
    grid_ = None
    if grid is None:
        check_tensor("x", x, 4)
        size = (x.shape[2], x.shape[3])
    else:
        check_tensor("x", x, 3)
        size = grid_ = as_pair("grid", grid, 1)
        if x.shape[1] != grid_[0] * grid_[1]:
            raise ValueError(f"x has {x.shape[1]} tokens, grid={tuple(grid_)} needs {grid_[0] * grid_[1]}")
    kernel, _, pad = geometry
    if any(n + 2 * p < k for n, k, p in zip(size, kernel, pad, strict=True)):
        raise ValueError(f"kernel_size={kernel} does not fit a grid of {tuple(size)} with padding={pad}")
    return grid_


class Names(NamedTuple):
    """How an op's messages call its arguments: what the Linear's and the LayerNorm's begin with."""

    linear: str = ""
    norm: str = "norm_"
    eps: str = "eps"


_NAMES = Names()


def check_split(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    grid: Sequence[int] | None,
    norm: Norm,
    folded: bool,
    names: Names = _NAMES,
) -> Split:
    """What lies in front of the Linear, checked; ``norm`` holds the arguments as they were given.

    Raises as :func:`soft_split_linear` does.
    """
    grid_ = check_grid(x, geometry, grid)
    linear, before = names.linear, names.norm
    channels = x.shape[1] if grid_ is None else x.shape[2]
    n = channels * geometry.kernel_size[0] * geometry.kernel_size[1]
    check_tensor(f"{linear}weight", weight, 2)
    check_shape(f"{linear}weight", weight, (weight.shape[0], n), "(out, C*kh*kw)")
    if bias is not None:
        check_shape(f"{linear}bias", bias, (weight.shape[0],), "(out,)")
    if norm.weight is not None:
        check_shape(f"{before}weight", norm.weight, (n,), "(C*kh*kw,)")
    if norm.bias is not None:
        if norm.weight is None:
            raise ValueError(
                f"{before}bias was given without {before}weight; pass both, {before}weight alone, or neither"
            )
        check_shape(f"{before}bias", norm.bias, (n,), "(C*kh*kw,)")
    check_alike(
        "x",
        x,
        (f"{linear}weight", weight),
        (f"{linear}bias", bias),
        (f"{before}weight", norm.weight),
        (f"{before}bias", norm.bias),
    )
    _check_folded(folded, weight, norm.weight, names)
    eps = check_epsilon(names.eps, norm.eps)
    has_norm = folded or norm.weight is not None
    return Split(geometry, grid_, Norm(norm.weight, norm.bias, eps) if has_norm else None)


def _check_folded(folded: bool, weight: Tensor, norm_weight: Tensor | None, names: Names) -> None:
    check_flag("folded", folded)
    linear, norm = names.linear, names.norm
    if folded and norm_weight is not None:
        raise ValueError(f"folded=True says that {linear}weight holds {norm}weight already; pass {norm}weight=None")
    if folded and weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"folded=True is for inference, and {linear}weight requires a gradient; pass the LayerNorm's weights, or "
            "call it under torch.no_grad()"
        )
