"""ops.performer_attention: against float64, the direct double sum, hand-written gradients, and 16-bit storage."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_close, gradients, hand_written, leaves
from torch import Tensor

from t2t_fast import ops
from t2t_fast.reference import performer_attention as reference

BACKENDS = ("reference", "aten")


def make(batch: int, tokens: int, dim: int, features: int, std: float = 0.7) -> tuple[Tensor, Tensor]:
    """A float64 kqv (batch, tokens, 3 * dim) and w (features, dim) with orthogonal rows of norm sqrt(features)."""
    w = torch.linalg.qr(torch.randn(max(dim, features), dim, dtype=torch.float64).T).Q.T[:features]
    return std * torch.randn(batch, tokens, 3 * dim, dtype=torch.float64), w[:features] * math.sqrt(features)


def double_sum(k: Tensor, q: Tensor, v: Tensor, w: Tensor, eps: float) -> Tensor:
    """Equation by equation, token by token: no factorisation of the kernel."""
    out = torch.zeros_like(v)
    for b in range(k.shape[0]):
        phi = [torch.exp(z[b] @ w.T - (z[b] ** 2).sum(-1, keepdim=True) / 2) / math.sqrt(w.shape[0]) for z in (k, q)]
        kernel = phi[1] @ phi[0].T
        out[b] = kernel @ v[b] / (kernel.sum(-1, keepdim=True) + eps)
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "dim", "features"), [(1, 16, 8), (57, 64, 32), (196, 40, 20), (33, 24, 24)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_forward_and_gradients(backend: str, tokens: int, dim: int, features: int, dtype: torch.dtype) -> None:
    kqv, w = make(2, tokens, dim, features)
    kqv, w = kqv.to(dtype), w.to(dtype)
    k, q, v = kqv.chunk(3, dim=-1)  # views of one tensor, as in the model
    exact = [t.double() for t in (k, q, v, w)]
    want = double_sum(*exact, 1e-8)
    got = ops.performer_attention(k, q, v, w, backend=backend)
    assert got.dtype == dtype
    assert_close(got, want, dtype, tokens)
    grad = torch.randn_like(want).to(dtype)
    wanted = reference.backward(grad.double(), *exact, 1e-8)
    found = gradients(lambda *t: ops.performer_attention(*t, backend=backend), (k, q, v, w), grad)
    for g, wanted_g in zip(found, wanted, strict=True):
        if tokens > 1:  # one token: y = v but for eps, and the other gradients vanish by cancellation
            assert_close(g, wanted_g, dtype, tokens * features, grad=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    kqv, w = make(2, 5, 6, 4)
    inputs = leaves(*kqv.chunk(3, dim=-1), w)
    function = lambda *t: ops.performer_attention(*t, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    assert torch.autograd.gradcheck(hand_written(reference.forward, reference.backward, 4), (*inputs, 1e-8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("std", [0.1, 1.0, 2.0, 5.0])
def test_eps_is_added_to_the_unscaled_denominator(backend: str, std: float) -> None:
    """At std 2 the denominator is of the size of eps, at 5 far below: a rescaled eps would change the function."""
    kqv, w = make(1, 50, 64, 32, std)
    k, q, v = (t.float() for t in kqv.chunk(3, dim=-1))
    want = double_sum(k.double(), q.double(), v.double(), w.float().double(), 1e-8)
    got = ops.performer_attention(k, q, v, w.float(), backend=backend).double()
    # The exponent, of size |w z| + |z|²/2, is rounded to float32: a relative error of phi.
    exponent = max((z.double().square().sum(-1) / 2).max() + (z.double() @ w.T).abs().max() for z in (k, q))
    assert (got - want).norm() <= 8 * 2**-24 * (4 + exponent) * want.norm() + 1e-30


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_keeps_float32_inside(backend: str, dtype: torch.dtype) -> None:
    """phi reaches e^16 and the denominator 1e-6: both beyond float16, which is where the original makes NaN."""
    kqv, w = make(1, 64, 64, 32, 1.0)
    kqv = kqv.to(dtype)
    kqv[0, 0, :64] = (w[0] * 0.99).to(dtype)  # a key along w: phi = exp(|w|²/2)
    k, q, v = kqv.chunk(3, dim=-1)
    with torch.autocast("cpu", dtype=dtype):
        got = ops.performer_attention(k, q, v, w.float(), backend=backend)
    want = double_sum(k.double(), q.double(), v.double(), w.float().double(), 1e-8)
    assert got.dtype == dtype
    assert_close(got, want, dtype, 64)


def test_bad_input_is_named() -> None:
    k = torch.randn(2, 5, 6)
    w = torch.randn(3, 6)
    with pytest.raises(ValueError, match=r"q must have shape the shape of k = \(2, 5, 6\), got \(2, 4, 6\)"):
        ops.performer_attention(k, k[:, 1:], k, w)
    with pytest.raises(ValueError, match=r"w must have shape \(m, E\) = \(3, 6\), got \(3, 5\)"):
        ops.performer_attention(k, k, k, w[:, 1:])
