"""ops.token_performer: the folded projection and the hand-written backward against the literal layer in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, gradients, hand_written, leaves, skip_unless_possible
from torch import Tensor

from t2t_fast import ops
from t2t_fast.reference import token_performer as reference

pytestmark = pytest.mark.usefixtures("on_device", "poisoned")

BACKENDS = ("reference", "aten", "triton")
EXACT = (0.0, 0.0, 1e-8, 1e-5)  # no dropout


def make(tokens: int, dim: int, features: int, hidden: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    tensors = [
        0.7 * torch.randn(2, tokens, 3 * dim),
        torch.nn.init.orthogonal_(torch.empty(features, dim)) * math.sqrt(features),
        torch.randn(dim, dim) / math.sqrt(dim),
        torch.randn(dim),
        1 + 0.2 * torch.randn(dim),
        0.2 * torch.randn(dim),
        torch.randn(hidden, dim) / math.sqrt(dim),
        torch.randn(hidden),
        torch.randn(dim, hidden) / math.sqrt(hidden),
        torch.randn(dim),
    ]
    return [t.to(dtype) for t in tensors]


def by_modules(tensors: list[Tensor]) -> Tensor:
    """The layer out of torch's own modules, the attention as a T x T matrix."""
    kqv, w, proj_w, proj_b, norm_w, norm_b, fc1_w, fc1_b, fc2_w, fc2_b = tensors
    k, q, v = kqv.chunk(3, dim=-1)
    phi_k, phi_q = (torch.exp(z @ w.T - z.square().sum(-1, keepdim=True) / 2) / math.sqrt(len(w)) for z in (k, q))
    kernel = phi_q @ phi_k.transpose(1, 2)
    y = v + F.linear(kernel @ v / (kernel.sum(-1, keepdim=True) + 1e-8), proj_w, proj_b)
    return y + F.linear(F.gelu(F.linear(F.layer_norm(y, y.shape[-1:], norm_w, norm_b), fc1_w, fc1_b)), fc2_w, fc2_b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "dim", "features", "hidden"), [(61, 64, 32, 64), (7, 24, 12, 40), (33, 16, 16, 8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_forward_and_gradients(
    backend: str, tokens: int, dim: int, features: int, hidden: int, dtype: torch.dtype
) -> None:
    skip_unless_possible(backend, dtype)
    tensors = make(tokens, dim, features, hidden, dtype)
    exact = [t.double() for t in tensors]
    want = by_modules(exact)
    got = ops.token_performer(*tensors, backend=backend)
    assert got.dtype == dtype
    assert_close(got, want, dtype, tokens + dim)
    grad = torch.randn_like(want).to(dtype)
    wanted = reference.backward(grad.double(), *exact, *EXACT)
    found = gradients(lambda *t: ops.token_performer(*t, backend=backend), tensors, grad)
    for g, w in zip(found, wanted, strict=True):
        assert_close(g, w, dtype, 2 * tokens * dim, grad=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    inputs = leaves(*make(3, 4, 2, 5))
    function = lambda *t: ops.token_performer(*t, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs)
    if backend != "triton":  # whose attention refuses second derivatives
        assert torch.autograd.gradgradcheck(function, inputs)
    assert torch.autograd.gradcheck(hand_written(reference.forward, reference.backward, 10), (*inputs, *EXACT))


@pytest.mark.parametrize("rates", [(0.3, 0.0), (0.0, 0.3), (0.2, 0.4)])
def test_gradcheck_with_dropout(rates: tuple[float, float]) -> None:
    """The mask of the forward pass is the mask of the backward pass."""

    def function(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        return ops.token_performer(*tensors, *rates, backend="aten")

    inputs = leaves(*make(4, 5, 3, 5))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    # Same seed, same masks, with and without gradients, in the literal form too.
    with torch.no_grad():
        torch.manual_seed(3)
        literal = ops.token_performer(*inputs, *rates, backend="reference")
        assert torch.allclose(function(*inputs), literal, rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_rate_and_scale(backend: str) -> None:
    tensors = make(300, 16, 8, 16)
    tensors[9] += 100.0  # fc2's bias dominates: what is dropped shows
    kept = ops.token_performer(*tensors, 0.0, 0.25, backend=backend) > 50
    assert abs(kept.double().mean().item() - 0.75) < 0.02
    outputs = [ops.token_performer(*tensors, 0.0, 0.25, backend=backend).mean().item() for _ in range(8)]
    assert len(set(outputs)) == 8
    assert abs(sum(outputs) / 8 - ops.token_performer(*tensors).mean().item()) < 2.0


def test_needs_less_memory_than_autograd() -> None:
    """What backward keeps: no LayerNorm output, no GELU output, no projected attention."""
    tensors = [t.requires_grad_() for t in make(128, 64, 32, 64, torch.float32)]
    sizes: dict[str, int] = {}
    for backend in BACKENDS:
        seen: dict[int, int] = {}

        def pack(t: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = ops.token_performer(*tensors, backend=backend)
        sizes[backend] = sum(seen.values())
        del out
    assert sizes["aten"] < 0.75 * sizes["reference"]


def test_bad_input_is_named() -> None:
    tensors = make(4, 6, 3, 5)
    for index, message in (
        (2, r"proj_weight must have shape \(E, E\) = \(6, 6\), got \(5, 6\)"),
        (4, r"norm_weight must have shape \(E,\) = \(6,\), got \(5,\)"),
        (7, r"fc1_bias must have shape \(hidden,\) = \(5,\), got \(4,\)"),
    ):
        wrong = [t[1:] if i == index else t for i, t in enumerate(tensors)]
        with pytest.raises(ValueError, match=message):
            ops.token_performer(*wrong)
    with pytest.raises(ValueError, match=r"kqv must have shape \(B, T, 3E\) = \(2, 4, 15\), got \(2, 4, 17\)"):
        ops.token_performer(tensors[0][..., :17], *tensors[1:])
    with pytest.raises(ValueError, match=r"mlp_drop must be in \[0, 1\), got 1\.0"):
        ops.token_performer(*tensors, 0.0, 1.0)
