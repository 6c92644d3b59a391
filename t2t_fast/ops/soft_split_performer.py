"""A soft split with its whole Performer token layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..aten import soft_split_performer as aten_soft_split_performer
from ..checks import check_epsilon
from ..dispatch import Implementation, Op
from ..reference import soft_split_performer as reference_soft_split_performer
from ..triton import soft_split_performer as triton_soft_split_performer
from .soft_split_linear import check_folded, check_soft_split_linear
from .token_performer import check_layer

_OP = Op(
    "soft_split_performer",
    (
        Implementation(
            "triton",
            triton_soft_split_performer.forward,
            triton_soft_split_performer.why_not,
            triton_soft_split_performer.why_not_auto,
            triton_soft_split_performer.detail,
        ),
        Implementation("aten", aten_soft_split_performer.forward),
        Implementation("reference", reference_soft_split_performer.forward),
    ),
)


def soft_split_performer(
    x: Tensor,
    kqv_weight: Tensor,
    kqv_bias: Tensor | None,
    norm1_weight: Tensor | None,
    norm1_bias: Tensor | None,
    w: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm2_weight: Tensor | None,
    norm2_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    grid: Sequence[int] | None = None,
    proj_drop: float = 0.0,
    mlp_drop: float = 0.0,
    eps: float = 1e-8,
    norm1_eps: float = 1e-5,
    norm2_eps: float = 1e-5,
    *,
    folded: bool = False,
    backend: str = "auto",
) -> Tensor:
    """``token_performer(soft_split_linear(x, ...), ...)`` (paper §3.1): one stage of the tokens-to-token module.

    In inference, Triton joins the two: keys are never stored, and queries only as the exponents of their features.

    Args:
        x: Image (B, C, H, W) or tokens (B, H*W, C) with ``grid=(H, W)``, as for :func:`soft_split`.
        kqv_weight: (3E, n) with n = C*kh*kw, columns in the order (c, i, j).
        kqv_bias: (3E,) or None.
        norm1_weight: The first LayerNorm's gamma (n,), or None for no LayerNorm, unless ``folded``.
        norm1_bias: Its beta (n,) or None; None without ``norm1_weight``.
        w: Random features (m, E); see :func:`performer_attention`, also for the numerics.
        proj_weight: (E, E).
        proj_bias: (E,).
        norm2_weight: The second LayerNorm's gamma (E,), or None for ones.
        norm2_bias: Its beta (E,), or None for zeros.
        fc1_weight: (hidden, E).
        fc1_bias: (hidden,).
        fc2_weight: (E, hidden).
        fc2_bias: (E,).
        kernel_size: Patch height and width in pixels, an int or a pair.
        stride: Step between patches, an int or a pair.
        padding: Zeros on each side, an int or a pair.
        grid: (H, W) of the token grid; None for an image.
        proj_drop: Dropout after the projection; pass 0 in evaluation.
        mlp_drop: Dropout after the MLP; pass 0 in evaluation.
        eps: Added to the attention's unscaled denominator.
        norm1_eps: The first LayerNorm's epsilon.
        norm2_eps: The second LayerNorm's epsilon.
        folded: The first LayerNorm is in ``kqv_weight`` and ``kqv_bias``, as for :func:`soft_split_linear`.
        backend: See :mod:`t2t_fast.ops`.

    Returns:
        (B, L, E).

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes do not fit together, or a dropout rate is outside [0, 1); or ``folded`` with
            ``norm1_weight``, or with a ``kqv_weight`` to be trained.
        BackendUnavailable: ``backend`` names one that cannot run here.
    """
    split = check_soft_split_linear(
        x, kqv_weight, kqv_bias, norm1_weight, norm1_bias, kernel_size, stride, padding, grid, "kqv_", "norm1_"
    )
    width = kqv_weight.shape[0] // 3
    if kqv_weight.shape[0] != 3 * width:
        raise ValueError(f"kqv_weight must have 3E rows, got {kqv_weight.shape[0]}, which is no multiple of 3")
    layer = (w, proj_weight, proj_bias, norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    check_layer("x", x, width, *layer, proj_drop, mlp_drop, norm="norm2_")
    check_folded(folded, kqv_weight, norm1_weight, "kqv_", "norm1_")
    norm1_eps, norm2_eps = check_epsilon("norm1_eps", norm1_eps), check_epsilon("norm2_eps", norm2_eps)
    rates = (proj_drop, mlp_drop, check_epsilon("eps", eps))
    return _OP(backend, (*split, norm1_eps, folded), (*layer, *rates, norm2_eps))
