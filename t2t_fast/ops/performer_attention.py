"""Performer attention: softmax attention's positive random-feature estimate, linear in the number of tokens."""

from __future__ import annotations

from torch import Tensor

from ..aten import performer_attention as aten_performer_attention
from ..checks import check_alike, check_epsilon, check_shape, check_tensor
from ..dispatch import Implementation, Op
from ..reference import performer_attention as reference_performer_attention
from ..triton import performer_attention as triton_performer_attention

_OP = Op(
    "performer_attention",
    (
        Implementation(
            "triton",
            triton_performer_attention.forward,
            triton_performer_attention.why_not,
            triton_performer_attention.why_not_auto,
        ),
        Implementation("aten", aten_performer_attention.forward),
        Implementation("reference", reference_performer_attention.forward),
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
    return _OP(backend, k, q, v, w, check_epsilon("eps", eps))
