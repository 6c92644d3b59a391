"""ops.performer_attention: against float64, the direct double sum, hand-written gradients, and 16-bit storage."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_close, gradients, hand_written, leaves, skip_unless_possible
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from t2t_fast import BackendUnavailable, ops
from t2t_fast.bench import samples
from t2t_fast.ops.performer import reference

pytestmark = pytest.mark.usefixtures("on_device", "poisoned")

BACKENDS = ("reference", "aten", "triton")


def make(batch: int, tokens: int, dim: int, features: int, std: float = 0.7) -> tuple[Tensor, Tensor]:
    """A float64 kqv (batch, tokens, 3 * dim) and w (features, dim) with orthogonal rows of norm sqrt(features)."""
    sizes = samples.Sizes(batch=batch, tokens=tokens, dim=dim, features=features)
    k, q, v, w = samples.make("performer_attention", sizes, torch.float64).values()
    return std / 0.7 * torch.cat((k, q, v), -1), w


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
    skip_unless_possible(backend, dtype)
    kqv, w = make(2, tokens, dim, features)
    kqv, w = kqv.to(dtype), w.to(dtype)
    k, q, v = kqv.chunk(3, dim=-1)  # views of one tensor, as in the model
    exact = [t.double() for t in (k, q, v, w)]
    want = double_sum(*exact, 1e-8)
    got = ops.performer_attention(k, q, v, w, backend=backend)
    assert got.dtype == dtype
    assert_close(got, want, dtype, tokens)
    grad = torch.randn_like(want).to(dtype)
    wanted = reference.performer_attention_backward(grad.double(), *exact, 1e-8)
    found = gradients(lambda *t: ops.performer_attention(*t, backend=backend), (k, q, v, w), grad)
    for g, wanted_g in zip(found, wanted, strict=True):
        if tokens > 1:  # one token: y = v but for eps, and the other gradients vanish by cancellation
            assert_close(g, wanted_g, dtype, tokens * features, grad=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    kqv, w = make(2, 5, 6, 4)
    inputs = leaves(*kqv.chunk(3, dim=-1), w)
    function = lambda *t: ops.performer_attention(*t, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs, fast_mode=backend == "triton")  # the interpreter takes its time
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=backend == "triton")
    assert torch.autograd.gradcheck(
        hand_written(reference.performer_attention, reference.performer_attention_backward, 4), (*inputs, 1e-8)
    )


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
    skip_unless_possible(backend, dtype)
    kqv, w = make(1, 64, 64, 32, 1.0)
    kqv = kqv.to(dtype)
    kqv[0, 0, :64] = (w[0] * 0.99).to(dtype)  # a key along w: phi = exp(|w|²/2)
    k, q, v = kqv.chunk(3, dim=-1)
    with torch.autocast(kqv.device.type, dtype=dtype):
        got = ops.performer_attention(k, q, v, w.float(), backend=backend)
    want = double_sum(k.double(), q.double(), v.double(), w.float().double(), 1e-8)
    assert got.dtype == dtype
    assert_close(got, want, dtype, 64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", [(0, 2, 1), (1, 0, 2), (2, 1, 0)])
def test_any_layout(backend: str, order: tuple[int, ...]) -> None:
    """Tokens, channels and images in any order in memory: a convolution makes tokens that lie apart."""
    kqv, w = make(3, 11, 8, 4)
    inputs = [t.permute(order).contiguous().permute(torch.tensor(order).argsort().tolist()) for t in kqv.chunk(3, -1)]
    grad = torch.randn(3, 11, 8, dtype=torch.float64)
    wanted = reference.performer_attention_backward(grad, *inputs, w, 1e-8)
    for backward_dtype in (torch.float64, torch.float32):  # of what a cast makes of the layout, too
        cast = [t.to(backward_dtype) for t in (*inputs, w)]
        found = gradients(lambda *t: ops.performer_attention(*t, backend=backend), cast, grad.to(backward_dtype))
        for f, want in zip(found, wanted, strict=True):
            assert_close(f, want, backward_dtype, 44, grad=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing(backend: str) -> None:
    kqv, w = make(1, 9, 8, 4)
    inputs = leaves(*kqv.chunk(3, dim=-1), w)
    function = lambda *t: ops.performer_attention(*t, backend=backend).square().sum()  # noqa: E731
    direct = torch.autograd.grad(function(*inputs), inputs)
    again = torch.autograd.grad(checkpoint(function, *inputs, use_reentrant=False), inputs)
    assert all(torch.equal(a, b) for a, b in zip(direct, again, strict=True))


def log_oracle(k: Tensor, q: Tensor, v: Tensor, w: Tensor, eps: float) -> Tensor:
    """The definition in float64, by logarithms: neither overflows nor loses what float64 would underflow."""
    exponents = [z @ w.T - z.square().sum(-1, keepdim=True) / 2 for z in (k, q)]
    log_sum, log_eps = torch.logsumexp(exponents[0], 1, keepdim=True), math.log(eps) + math.log(w.shape[0])
    log_denominator = torch.logaddexp(
        torch.logsumexp(exponents[1] + log_sum, 2), torch.tensor(log_eps, dtype=torch.float64)
    )
    log_kernel = torch.logsumexp(exponents[1][:, :, None] + exponents[0][:, None], -1)
    return torch.exp(log_kernel - log_denominator[..., None]) @ v


def largest_exponent(k: Tensor, q: Tensor, w: Tensor) -> float:
    """Of w z and |z|²/2, which are rounded before they are subtracted."""
    pairs = ((z.double(), z.double() @ w.double().T) for z in (k, q))
    return max(((z.square().sum(-1) / 2).max() + products.abs().max()).item() for z, products in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("square", [32.0, 200.0])
@pytest.mark.parametrize("std", [0.1, 1.0, 2.0, 5.0, 20.0])
def test_any_scale_in_triton(std: float, square: float, dtype: torch.dtype) -> None:
    """|w|² up to 200 puts phi at e^100, a deviation of 20 puts the denominator at e^-25000: both beyond float32."""
    skip_unless_possible("triton", dtype)
    kqv, w = make(2, 70, 64, 32, std)
    kqv, w = kqv.to(dtype), (w * math.sqrt(square / 32)).double().to(dtype)
    kqv[:, 3] = torch.cat((w[0], w[0], w[1]))  # a key and a query where phi is largest
    k, q, v = kqv.chunk(3, dim=-1)
    want = log_oracle(*(t.double() for t in (k, q, v, w)), 1e-8)
    got = ops.performer_attention(k, q, v, w, backend="triton").double()
    assert torch.isfinite(got).all()
    # Sums of E = 64 terms in float32 round an exponent by sqrt(E) units of its terms at most: that is phi's relative
    # error, once for keys and once for queries. The output adds the rounding of its dtype, and its smallest number.
    exponent = largest_exponent(k, q, w)
    bound = 2 * math.sqrt(64) * 2.0**-24 * exponent + 4 * torch.finfo(dtype).eps
    smallest = torch.finfo(dtype).smallest_normal
    assert (got - want).norm() <= bound * want.norm() + smallest * want.numel() ** 0.5


@pytest.mark.parametrize("std", [0.1, 2.0, 5.0, 20.0])
def test_gradients_at_any_scale_in_triton(std: float) -> None:
    kqv, w = make(1, 40, 32, 16, std)
    inputs = [t.float() for t in (*kqv.chunk(3, dim=-1), w)]
    grad = torch.randn(1, 40, 32)
    exact = [t.double().requires_grad_() for t in inputs]
    wanted = torch.autograd.grad(log_oracle(*exact, 1e-8), exact, grad.double())
    found = gradients(lambda *t: ops.performer_attention(*t, backend="triton"), inputs, grad)
    exponent = largest_exponent(inputs[0], inputs[1], inputs[3])
    for g, w_ in zip(found, wanted, strict=True):
        assert torch.isfinite(g).all()
        assert (g - w_).norm() <= 4 * math.sqrt(32) * 2.0**-24 * exponent * w_.norm() + 1e-30 * grad.norm()


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 63, 65, 4096])
def test_any_number_of_tokens_in_triton(tokens: int) -> None:
    kqv, w = make(1 if tokens > 100 else 3, tokens, 16, 8)
    k, q, v = kqv.float().chunk(3, dim=-1)
    want = double_sum(*(t.double() for t in (k, q, v, w.float())), 1e-8)
    assert_close(ops.performer_attention(k, q, v, w.float(), backend="triton"), want, torch.float32, tokens)


@pytest.mark.parametrize(("dim", "features"), [(16, 8), (17, 9), (100, 60), (128, 128)])
def test_any_width_in_triton(dim: int, features: int) -> None:
    kqv, w = make(2, 20, dim, features, 0.4)
    inputs = [*kqv.chunk(3, dim=-1), w]
    want = double_sum(*inputs, 1e-8)
    assert_close(ops.performer_attention(*inputs, backend="triton"), want, torch.float64, 20 * features)
    grad = torch.randn_like(want)
    wanted = reference.performer_attention_backward(grad, *inputs, 1e-8)
    found = gradients(lambda *t: ops.performer_attention(*t, backend="triton"), inputs, grad)
    for g, w_ in zip(found, wanted, strict=True):
        assert_close(g, w_, torch.float64, 20 * features, grad=True)


def test_what_is_too_wide_for_triton_is_refused() -> None:
    k = torch.randn(1, 4, 130)
    with pytest.raises(BackendUnavailable, match=r"w is too large.* up to 128"):
        ops.performer_attention(k, k, k, torch.randn(8, 130), backend="triton")


def test_equal_runs_are_equal_to_the_last_bit_in_triton() -> None:
    kqv, w = make(2, 200, 32, 16)
    inputs = [t.float() for t in (*kqv.chunk(3, dim=-1), w)]
    grad = torch.randn(2, 200, 32)
    first, second = (
        gradients(lambda *t: ops.performer_attention(*t, backend="triton"), inputs, grad) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_bad_input_is_named() -> None:
    k = torch.randn(2, 5, 6)
    w = torch.randn(3, 6)
    with pytest.raises(ValueError, match=r"q must have .*k = \(2, 5, 6\), got \(2, 4, 6\)"):
        ops.performer_attention(k, k[:, 1:], k, w)
    with pytest.raises(ValueError, match=r"w must have shape \(m, E\) = \(3, 6\), got \(3, 5\)"):
        ops.performer_attention(k, k, k, w[:, 1:])
