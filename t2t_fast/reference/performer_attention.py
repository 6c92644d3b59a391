"""Performer attention with positive random features (paper §3.1; FAVOR+, arXiv 2009.14794, equation 5).

::

    phi(z) = exp(w z - |z|²/2) / sqrt(m)
    y_t    = phi(q_t) (Σ_s phi(k_s) v_sᵀ) / (phi(q_t) · Σ_s phi(k_s) + eps)

Everything is computed in float32 (float64 for float64 input) whatever the input dtype and autocast: phi reaches
exp(|w|²/2), e^16 with the usual w, beyond float16.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..numerics import compute_dtype, no_autocast


def features(z: Tensor, w: Tensor) -> Tensor:
    """phi(z): (B, T, E) and (m, E) to (B, T, m)."""
    half_square = (z * z).sum(-1, keepdim=True) / 2
    return torch.exp(torch.einsum("bte,me->btm", z, w) - half_square) / math.sqrt(w.shape[0])


def forward(k: Tensor, q: Tensor, v: Tensor, w: Tensor, eps: float) -> Tensor:
    """(B, T, E) each, w (m, E); returns (B, T, E) in the dtype of ``v``."""
    dtype = compute_dtype(k, q, v)
    with no_autocast(v):
        phi_k, phi_q = features(k.to(dtype), w.to(dtype)), features(q.to(dtype), w.to(dtype))
        denominator = torch.einsum("btm,bm->bt", phi_q, phi_k.sum(dim=1)).unsqueeze(2) + eps
        phi_k_v = torch.einsum("bte,btm->bem", v.to(dtype), phi_k)
        return (torch.einsum("btm,bem->bte", phi_q, phi_k_v) / denominator).to(v.dtype)


def backward(
    grad: Tensor, k: Tensor, q: Tensor, v: Tensor, w: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (k, q, v, w).

    With S = Σ phi(k), A = Σ phi(k) vᵀ, N = phi(q) A, D = phi(q) · S + eps and y = N / D::

        dN = dy / D                       dD = -(dy · y) / D
        dphi_q = dN Aᵀ + dD S             dA = Σ phi(q) dNᵀ       dS = Σ dD phi(q)
        dphi_k = v dAᵀ + dS               dv = phi(k) dA
        dz = (dphi * phi) w - z Σ_m (dphi * phi)      dw = Σ (dphi * phi) zᵀ    for z = k and z = q
    """
    phi_k, phi_q = features(k, w), features(q, w)
    total = phi_k.sum(dim=1, keepdim=True)
    phi_k_v = phi_k.transpose(1, 2) @ v
    denominator = (phi_q * total).sum(-1, keepdim=True) + eps
    y = phi_q @ phi_k_v / denominator
    d_numerator = grad / denominator
    d_denominator = -(grad * y).sum(-1, keepdim=True) / denominator
    d_phi_q = d_numerator @ phi_k_v.transpose(1, 2) + d_denominator * total
    d_phi_k_v = phi_q.transpose(1, 2) @ d_numerator
    d_total = (d_denominator * phi_q).sum(dim=1, keepdim=True)
    d_phi_k = v @ d_phi_k_v.transpose(1, 2) + d_total
    dv = phi_k @ d_phi_k_v
    dk, dw_k = _features_backward(d_phi_k, phi_k, k, w)
    dq, dw_q = _features_backward(d_phi_q, phi_q, q, w)
    return dk, dq, dv, dw_k + dw_q


def _features_backward(d_phi: Tensor, phi: Tensor, z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    d_exponent = d_phi * phi
    dz = d_exponent @ w - z * d_exponent.sum(-1, keepdim=True)
    return dz, torch.einsum("btm,bte->me", d_exponent, z)
