"""Derivatives that several hand-written backward passes of the definitions share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gelu_slope(a: Tensor) -> Tensor:
    """``gelu'(a) = Phi(a) + a exp(-a²/2) / sqrt(2 pi)`` of the exact (erf) GELU."""
    return torch.special.ndtr(a) + a * torch.exp(-a * a / 2) / math.sqrt(2 * math.pi)


def standardize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``z = (x - mean) rstd`` over the last dimension, and ``rstd``: a LayerNorm without its affine part."""
    var, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    rstd = torch.rsqrt(var + eps)
    return (x - mean) * rstd, rstd


def standardize_backward(dz: Tensor, z: Tensor, rstd: Tensor) -> Tensor:
    """``dx = rstd (dz - mean(dz) - z mean(z dz))``, the gradient of :func:`standardize`."""
    return rstd * (dz - dz.mean(-1, keepdim=True) - z * (z * dz).mean(-1, keepdim=True))
