"""Soft split: overlapping patches of an image or of a token grid, as tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..aten import soft_split as aten_soft_split
from ..checks import as_pair, check_tensor
from ..dispatch import Implementation, Op
from ..reference import soft_split as reference_soft_split
from ..triton import soft_split as triton_soft_split

Pair = tuple[int, int]

_OP = Op(
    "soft_split",
    (
        Implementation("triton", triton_soft_split.forward, triton_soft_split.why_not, triton_soft_split.why_not_auto),
        Implementation("aten", aten_soft_split.forward),
        Implementation("reference", reference_soft_split.forward),
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
    geometry, grid_ = check_soft_split(x, kernel_size, stride, padding, grid)
    return _OP(backend, x, *geometry, grid_)


def output_grid(
    size: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
) -> Pair:
    """The (h, w) grid of tokens that a soft split makes of an image or grid of ``size`` (H, W)."""
    kernel, step, pad = (
        as_pair("kernel_size", kernel_size, 1),
        as_pair("stride", stride, 1),
        as_pair("padding", padding, 0),
    )
    return reference_soft_split.window_grid(size, kernel, step, pad)


def check_soft_split(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    grid: Sequence[int] | None,
) -> tuple[tuple[Pair, Pair, Pair], Pair | None]:
    """The checked geometry ``(kernel, stride, padding), grid`` as pairs; raises as :func:`soft_split` does."""
    kernel, step, pad = (
        as_pair("kernel_size", kernel_size, 1),
        as_pair("stride", stride, 1),
        as_pair("padding", padding, 0),
    )
    grid_ = None
    if grid is None:
        check_tensor("x", x, 4)
        size = (x.shape[2], x.shape[3])
    else:
        check_tensor("x", x, 3)
        size = grid_ = as_pair("grid", grid, 1)
        if x.shape[1] != grid_[0] * grid_[1]:
            raise ValueError(f"x has {x.shape[1]} tokens, grid={tuple(grid_)} needs {grid_[0] * grid_[1]}")
    if any(n + 2 * p < k for n, k, p in zip(size, kernel, pad, strict=True)):
        raise ValueError(f"kernel_size={kernel} does not fit a grid of {tuple(size)} with padding={pad}")
    return (kernel, step, pad), grid_
