"""The Performer token layer after its k, q, v projection."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..aten import token_performer as aten_token_performer
from ..checks import check_alike, check_epsilon, check_probability, check_shape, check_tensor
from ..dispatch import Implementation, Op
from ..reference import token_performer as reference_token_performer
from ..triton import token_performer as triton_token_performer

_OP = Op(
    "token_performer",
    (
        Implementation(
            "triton",
            triton_token_performer.forward,
            triton_token_performer.why_not,
            triton_token_performer.why_not_auto,
            triton_token_performer.detail,
        ),
        Implementation("aten", aten_token_performer.forward),
        Implementation("reference", reference_token_performer.forward),
    ),
)


def token_performer(
    kqv: Tensor,
    w: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    proj_drop: float = 0.0,
    mlp_drop: float = 0.0,
    eps: float = 1e-8,
    norm_eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> Tensor:
    """Everything of a Performer token layer behind its first Linear (paper §3.1)::

        k, q, v = kqv;    y = v + dropout(proj(performer_attention(k, q, v, w)))
        out = y + dropout(fc2(gelu(fc1(layer_norm(y)))))

    Args:
        kqv: (B, T, 3E): keys, queries and values side by side, as :func:`soft_split_linear` makes them.
        w: Random features (m, E); see :func:`performer_attention`, also for the numerics.
        proj_weight: (E, E).
        proj_bias: (E,).
        norm_weight: LayerNorm's gamma (E,), or None for ones.
        norm_bias: LayerNorm's beta (E,), or None for zeros.
        fc1_weight: (hidden, E); hidden is E in the paper.
        fc1_bias: (hidden,).
        fc2_weight: (E, hidden).
        fc2_bias: (E,).
        proj_drop: Dropout after the projection; pass 0 in evaluation.
        mlp_drop: Dropout after the MLP; pass 0 in evaluation.
        eps: Added to the attention's unscaled denominator.
        norm_eps: LayerNorm's epsilon.
        backend: See :mod:`t2t_fast.ops`.

    Returns:
        (B, T, E).

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes do not fit together, or a dropout rate is outside [0, 1).
        BackendUnavailable: ``backend`` names one that cannot run here.
    """
    check_tensor("kqv", kqv, 3)
    width = kqv.shape[2] // 3
    check_shape("kqv", kqv, (*kqv.shape[:2], 3 * width), "(B, T, 3E)")
    layer = (w, proj_weight, proj_bias, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    check_layer("kqv", kqv, width, *layer, proj_drop, mlp_drop)
    epsilons = check_epsilon("eps", eps), check_epsilon("norm_eps", norm_eps)
    return _OP(backend, kqv, *layer, proj_drop, mlp_drop, *epsilons)


def check_layer(
    x_name: str,
    x: Tensor,
    width: int,
    w: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    proj_drop: float,
    mlp_drop: float,
    norm: str = "norm_",
) -> None:
    """Raise unless these belong to tokens of ``width`` E, in the dtype of ``x``.

    ``norm`` is how the LayerNorm's names begin.
    """
    check_tensor("w", w, 2)
    check_shape("w", w, (w.shape[0], width), "(m, E)")
    check_tensor("fc1_weight", fc1_weight, 2)
    hidden = fc1_weight.shape[0]
    check_shape("proj_weight", proj_weight, (width, width), "(E, E)")
    check_shape("fc1_weight", fc1_weight, (hidden, width), "(hidden, E)")
    check_shape("fc2_weight", fc2_weight, (width, hidden), "(E, hidden)")
    check_shape("fc1_bias", fc1_bias, (hidden,), "(hidden,)")
    vectors: dict[str, Any] = {
        "proj_bias": proj_bias,
        f"{norm}weight": norm_weight,
        f"{norm}bias": norm_bias,
        "fc2_bias": fc2_bias,
    }
    for name, vector in vectors.items():
        if vector is not None or not name.startswith(norm):
            check_shape(name, vector, (width,), "(E,)")
    weights = {"w": w, "proj_weight": proj_weight, "fc1_weight": fc1_weight, "fc2_weight": fc2_weight}
    check_alike(x_name, x, *weights.items(), *vectors.items(), ("fc1_bias", fc1_bias))
    check_probability("proj_drop", proj_drop)
    check_probability("mlp_drop", mlp_drop)
