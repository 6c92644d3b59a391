"""The definitions: Performer attention, the token layer around it, and a soft split in front of both.

Attention with positive random features (paper §3.1; FAVOR+, arXiv 2009.14794, equation 5)::

    phi(z) = exp(w z - |z|²/2) / sqrt(m)
    y_t    = phi(q_t) (Σ_s phi(k_s) v_sᵀ) / (phi(q_t) · Σ_s phi(k_s) + eps)

The attention is computed in float32 (float64 for float64 input) whatever the input dtype and autocast: phi reaches
exp(|w|²/2), e^16 with the usual w, beyond float16.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...numerics import compute_dtype, no_autocast
from ..common.derivatives import gelu_slope, standardize, standardize_backward
from ..soft_splits import reference as soft_split
from ..soft_splits.arguments import Split
from .arguments import Layer, Options


def features(z: Tensor, w: Tensor) -> Tensor:
    """phi(z): (B, T, E) and (m, E) to (B, T, m)."""
    half_square = (z * z).sum(-1, keepdim=True) / 2
    return torch.exp(torch.einsum("bte,me->btm", z, w) - half_square) / math.sqrt(w.shape[0])


def performer_attention(k: Tensor, q: Tensor, v: Tensor, w: Tensor, eps: float) -> Tensor:
    """(B, T, E) each, w (m, E); returns (B, T, E) in the dtype of ``v``."""
    dtype = compute_dtype(k, q, v)
    with no_autocast(v):
        phi_k, phi_q = features(k.to(dtype), w.to(dtype)), features(q.to(dtype), w.to(dtype))
        denominator = torch.einsum("btm,bm->bt", phi_q, phi_k.sum(dim=1)).unsqueeze(2) + eps
        phi_k_v = torch.einsum("bte,btm->bem", v.to(dtype), phi_k)
        return (torch.einsum("btm,bem->bte", phi_q, phi_k_v) / denominator).to(v.dtype)


def performer_attention_backward(
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


def token_performer(
    kqv: Tensor,
    layer: Layer,
    options: Options,
    attention: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor] = performer_attention,
) -> Tensor:
    """(B, T, 3E) to (B, T, E): attention, projection, skip with v, MLP; other implementations pass their attention."""
    k, q, v = kqv.chunk(3, dim=-1)
    y = F.linear(attention(k, q, v, layer.w, options.eps), layer.proj_weight, layer.proj_bias)
    y = v + F.dropout(y, options.proj_drop)
    normed = F.layer_norm(y, (y.shape[-1],), layer.norm_weight, layer.norm_bias, options.norm_eps)
    hidden = F.gelu(F.linear(normed, layer.fc1_weight, layer.fc1_bias))
    return y + F.dropout(F.linear(hidden, layer.fc2_weight, layer.fc2_bias), options.mlp_drop)


def token_performer_backward(grad: Tensor, kqv: Tensor, layer: Layer, options: Options) -> tuple[Tensor, Layer]:
    """Gradients of kqv and of the weights, without dropout; the LayerNorm has gamma and beta here.

    With y = v + P a + b, z = LayerNorm(y), h = F1 z + b1 and out = y + F2 gelu(h) + b2::

        dh = (F2ᵀ dout) gelu'(h)      dy = dout + LayerNorm'(F1ᵀ dh)      da = Pᵀ dy      dv = dy + attention'(da)
    """
    assert layer.norm_weight is not None and layer.norm_bias is not None
    k, q, v = kqv.chunk(3, dim=-1)
    attended = performer_attention(k, q, v, layer.w, options.eps)
    y = v + F.linear(attended, layer.proj_weight, layer.proj_bias)
    z, rstd = standardize(y, options.norm_eps)
    normed = z * layer.norm_weight + layer.norm_bias
    h = F.linear(normed, layer.fc1_weight, layer.fc1_bias)
    dh = (grad @ layer.fc2_weight) * gelu_slope(h)
    d_normed = dh @ layer.fc1_weight
    dz = d_normed * layer.norm_weight
    dy = grad + standardize_backward(dz, z, rstd)
    dk, dq, dv, dw = performer_attention_backward(dy @ layer.proj_weight, k, q, v, layer.w, options.eps)
    d_layer = Layer(
        w=dw,
        proj_weight=_outer(dy, attended),
        proj_bias=dy.sum((0, 1)),
        norm_weight=(d_normed * z).sum((0, 1)),
        norm_bias=d_normed.sum((0, 1)),
        fc1_weight=_outer(dh, normed),
        fc1_bias=dh.sum((0, 1)),
        fc2_weight=_outer(grad, F.gelu(h)),
        fc2_bias=grad.sum((0, 1)),
    )
    return torch.cat((dk, dq, dv + dy), dim=-1), d_layer


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left.flatten(0, 1).T @ right.flatten(0, 1)


def soft_split_performer(
    x: Tensor, kqv_weight: Tensor, kqv_bias: Tensor | None, split: Split, layer: Layer, options: Options
) -> Tensor:
    """One after the other, (B, L, E)."""
    return token_performer(soft_split.soft_split_linear(x, kqv_weight, kqv_bias, split), layer, options)
