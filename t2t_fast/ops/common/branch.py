"""The end of a residual branch: ``residual + scale * y``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ...checks import check_same_device, check_shape


class Branch(NamedTuple):
    """What ends a residual branch: the tokens added to its result, and the result's factor per image, (B,), or None."""

    residual: Tensor | None = None
    scale: Tensor | None = None


def add_branch(y: Tensor, branch: Branch) -> Tensor:
    """``residual + scale * y``, either of which may be None."""
    if branch.scale is not None:
        y = y * branch.scale.to(y.dtype)[:, None, None]
    return y if branch.residual is None else branch.residual + y


def check_branch(name: str, x: Tensor, shape: Sequence[int], branch: Branch, residual_name: str = "residual") -> None:
    """Raise unless the residual has the result's ``shape``, the scale a number per image, and both the device of ``x``.

    ``name`` is what ``x`` is called.
    """
    residual, scale = branch
    if residual is not None:
        check_shape(residual_name, residual, shape, "that of the result")
    if scale is not None:
        check_shape("branch_scale", scale, shape[:1], "(B,)")
    check_same_device(name, x, (residual_name, residual), ("branch_scale", scale))
