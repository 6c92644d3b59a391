"""The Performer (paper §3.1): attention, the token layer around it, and a soft split with such a layer behind.

Its attention is softmax attention's positive random-feature estimate, linear in the number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...checks import check_alike, check_epsilon, check_probability, check_shape, check_tensor
from ...dispatch import Implementation, Op
from ..common.norm import Norm
from ..soft_splits.op import Names, check_geometry, check_split
from . import aten, native, reference, triton_attention, triton_layer
from .arguments import Layer, Options

_PERFORMER_ATTENTION = Op(
    "performer_attention",
    (
        Implementation(
            "triton",
            triton_attention.performer_attention,
            triton_attention.why_not_performer_attention,
            triton_attention.why_not_auto_performer_attention,
        ),
        Implementation("aten", aten.performer_attention),
        Implementation("reference", reference.performer_attention),
    ),
)
_TOKEN_PERFORMER = Op(
    "token_performer",
    (
        Implementation(
            "triton",
            triton_layer.token_performer,
            triton_layer.why_not_token_performer,
            triton_layer.why_not_auto_token_performer,
            triton_layer.describe_token_performer,
        ),
        Implementation(
            "native", native.token_performer, native.why_not_token_performer, native.why_not_auto_token_performer
        ),
        Implementation("aten", aten.token_performer),
        Implementation("reference", reference.token_performer),
    ),
)
_SOFT_SPLIT_PERFORMER = Op(
    "soft_split_performer",
    (
        Implementation(
            "triton",
            triton_layer.soft_split_performer,
            triton_layer.why_not_soft_split_performer,
            triton_layer.why_not_auto_soft_split_performer,
            triton_layer.describe_soft_split_performer,
        ),
        Implementation(
            "native",
            native.soft_split_performer,
            native.why_not_soft_split_performer,
            native.why_not_auto_soft_split_performer,
            native.describe_soft_split_performer,
        ),
        Implementation("aten", aten.soft_split_performer),
        Implementation("reference", reference.soft_split_performer),
    ),
)


def performer_attention(
    k: Tensor, q: Tensor, v: Tensor, w: Tensor, eps: float = 1e-8, *, backend: str = "auto"
) -> Tensor:
    """Single-head, non-causal random-feature attention (paper §3.1; FAVOR+, arXiv 2009.14794).

    ``phi(z) = exp(w z - |z|²/2) / sqrt(m)`` and
    ``y = phi(q) (Σ phi(k) vᵀ) / (phi(q) · Σ phi(k) + eps)``, computed in float32 (float64 for float64 input) in
    every dtype and under autocast.

    Args:
        k: Keys (B, T, E). Views are fine, such as the three parts of one (B, T, 3E) tensor.
        q: Queries (B, T, E).
        v: Values (B, T, E).
        w: Random features (m, E), rows orthogonal with norm sqrt(m) in the original.
        eps: Added to the unscaled denominator.
        backend: See :mod:`t2t_fast.ops`.

    Returns:
        (B, T, E) in the dtype of ``v``.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes do not fit together.
        BackendUnavailable: ``backend`` names one that cannot run here.
    """
    check_tensor("k", k, 3)
    check_shape("q", q, k.shape, "the shape of k")
    check_shape("v", v, k.shape, "the shape of k")
    check_tensor("w", w, 2)
    check_shape("w", w, (w.shape[0], k.shape[2]), "(m, E)")
    check_alike("k", k, ("q", q), ("v", v), ("w", w))
    return _PERFORMER_ATTENTION(backend, k, q, v, w, check_epsilon("eps", eps))


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
    layer = Layer(w, proj_weight, proj_bias, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    options = Options(proj_drop, mlp_drop, eps, norm_eps)
    return _TOKEN_PERFORMER(backend, kqv, layer, _check_layer("kqv", kqv, width, layer, options, "norm_"))


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
    geometry, norm1 = check_geometry(kernel_size, stride, padding), Norm(norm1_weight, norm1_bias, norm1_eps)
    split = check_split(x, kqv_weight, kqv_bias, geometry, grid, norm1, folded, _KQV)
    width = kqv_weight.shape[0] // 3
    if kqv_weight.shape[0] != 3 * width:
        raise ValueError(f"kqv_weight must have 3E rows, got {kqv_weight.shape[0]}, which is no multiple of 3")
    layer = Layer(w, proj_weight, proj_bias, norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    options = _check_layer("x", x, width, layer, Options(proj_drop, mlp_drop, eps, norm2_eps), "norm2_")
    return _SOFT_SPLIT_PERFORMER(backend, x, kqv_weight, kqv_bias, split, layer, options)


_KQV = Names("kqv_", "norm1_", "norm1_eps")


def _check_layer(name: str, x: Tensor, width: int, layer: Layer, options: Options, norm: str) -> Options:
    """The checked options; raises unless the weights belong to tokens of ``width`` E, in the dtype of ``x``.

    ``name`` is what ``x`` is called, and ``norm`` how the LayerNorm's arguments begin.
    """
    check_tensor("w", layer.w, 2)
    check_shape("w", layer.w, (layer.w.shape[0], width), "(m, E)")
    check_tensor("fc1_weight", layer.fc1_weight, 2)
    hidden = layer.fc1_weight.shape[0]
    check_shape("proj_weight", layer.proj_weight, (width, width), "(E, E)")
    check_shape("fc1_weight", layer.fc1_weight, (hidden, width), "(hidden, E)")
    check_shape("fc2_weight", layer.fc2_weight, (width, hidden), "(E, hidden)")
    check_shape("fc1_bias", layer.fc1_bias, (hidden,), "(hidden,)")
    check_shape("proj_bias", layer.proj_bias, (width,), "(E,)")
    affine = ((f"{norm}weight", layer.norm_weight), (f"{norm}bias", layer.norm_bias))
    for part, vector in affine:
        if vector is not None:
            check_shape(part, vector, (width,), "(E,)")
    check_shape("fc2_bias", layer.fc2_bias, (width,), "(E,)")
    check_alike(
        name,
        x,
        ("w", layer.w),
        ("proj_weight", layer.proj_weight),
        ("fc1_weight", layer.fc1_weight),
        ("fc2_weight", layer.fc2_weight),
        ("proj_bias", layer.proj_bias),
        *affine,
        ("fc2_bias", layer.fc2_bias),
        ("fc1_bias", layer.fc1_bias),
    )
    check_probability("proj_drop", options.proj_drop)
    check_probability("mlp_drop", options.mlp_drop)
    eps, norm_eps = check_epsilon("eps", options.eps), check_epsilon(f"{norm}eps", options.norm_eps)
    return Options(options.proj_drop, options.mlp_drop, eps, norm_eps)
