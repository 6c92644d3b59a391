"""The end of a residual branch: ``residual + branch_scale * y``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...checks import check_same_device, check_shape


def add_branch(y: Tensor, residual: Tensor | None, branch_scale: Tensor | None) -> Tensor:
    """``residual + branch_scale * y``, either of which may be None; ``branch_scale`` is (B,)."""
    if branch_scale is not None:
        y = y * branch_scale.to(y.dtype)[:, None, None]
    return y if residual is None else residual + y


def check_branch(
    name: str,
    x: Tensor,
    shape: Sequence[int],
    residual: Tensor | None,
    branch_scale: Tensor | None,
    residual_name: str = "residual",
) -> None:
    """Raise unless the residual has the result's ``shape``, the scale a number per image, and both the device of ``x``.

    ``name`` is what ``x`` is called.
    """
    if residual is not None:
        check_shape(residual_name, residual, shape, "that of the result")
    if branch_scale is not None:
        check_shape("branch_scale", branch_scale, shape[:1], "(B,)")
    check_same_device(name, x, (residual_name, residual), ("branch_scale", branch_scale))
