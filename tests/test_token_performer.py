"""ops.token_performer: the folded projection and the hand-written backward against the literal layer in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, assert_close, gradients, hand_written, leaves, skip_unless_possible, widest, with_dtypes
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from t2t_fast import ops
from t2t_fast.bench import samples
from t2t_fast.ops.common import extension
from t2t_fast.ops.performer import reference
from t2t_fast.ops.performer.arguments import Layer, Options

pytestmark = pytest.mark.usefixtures("on_device", "poisoned")

BACKENDS = ("reference", "aten", "triton", "native")
IN_FLOAT64 = BACKENDS[:3]
EXACT = Options(0.0, 0.0, 1e-8, 1e-5)  # no dropout


def forward(kqv: Tensor, *layer: Tensor) -> Tensor:
    """The definition, without dropout."""
    return reference.token_performer(kqv, Layer(*layer), EXACT)


def backward(grad: Tensor, kqv: Tensor, *layer: Tensor) -> tuple[Tensor, ...]:
    """The definition's gradients of all tensors."""
    d_kqv, d_layer = reference.token_performer_backward(grad, kqv, Layer(*layer), EXACT)
    return d_kqv, *d_layer


def make(tokens: int, dim: int, features: int, hidden: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    sizes = samples.Sizes(tokens=tokens, dim=dim, features=features, hidden=hidden)
    return list(samples.make("token_performer", sizes, dtype).values())


ALL_BUT_W = (0, *range(2, 10))


def pick(tensors: Sequence[Any], which: slice | tuple[int, ...]) -> list[Any]:
    return list(tensors[which]) if isinstance(which, slice) else [tensors[i] for i in which]


def frozen(tensors: Sequence[Tensor], *rates: float, backend: str) -> Callable[..., Tensor]:
    """The layer as a function of all tensors but w, as in the models, which do not learn it."""
    w = tensors[1].detach()
    return lambda kqv, *weights: ops.token_performer(kqv, w, *weights, *rates, backend=backend)


def learned(*rates: float, backend: str) -> Callable[..., Tensor]:
    """The layer as a function of all tensors."""
    return lambda *tensors: ops.token_performer(*tensors, *rates, backend=backend)


def by_modules(tensors: list[Tensor]) -> Tensor:
    """The layer out of torch's own modules, the attention as a T x T matrix."""
    kqv, w, proj_w, proj_b, norm_w, norm_b, fc1_w, fc1_b, fc2_w, fc2_b = tensors
    k, q, v = kqv.chunk(3, dim=-1)
    phi_k, phi_q = (torch.exp(z @ w.T - z.square().sum(-1, keepdim=True) / 2) / math.sqrt(len(w)) for z in (k, q))
    kernel = phi_q @ phi_k.transpose(1, 2)
    y = v + F.linear(kernel @ v / (kernel.sum(-1, keepdim=True) + 1e-8), proj_w, proj_b)
    return y + F.linear(F.gelu(F.linear(F.layer_norm(y, y.shape[-1:], norm_w, norm_b), fc1_w, fc1_b)), fc2_w, fc2_b)


@pytest.mark.parametrize(("backend", "dtype"), with_dtypes(BACKENDS, native=DTYPES[1:]))
@pytest.mark.parametrize(("tokens", "dim", "features", "hidden"), [(61, 64, 32, 64), (7, 24, 12, 40), (33, 16, 16, 8)])
def test_forward_and_gradients(
    backend: str, tokens: int, dim: int, features: int, hidden: int, dtype: torch.dtype
) -> None:
    skip_unless_possible(backend, torch.float32 if backend == "native" else dtype)  # of the matmuls
    tensors = make(tokens, dim, features, hidden, dtype)
    exact = [t.double() for t in tensors]
    want = by_modules(exact)
    got = ops.token_performer(*tensors, backend=backend)
    assert got.dtype == dtype
    assert_close(got, want, dtype, tokens + dim)
    grad = torch.randn_like(want).to(dtype)
    wanted = backward(grad.double(), *exact)
    for layer, chosen in ((frozen(tensors, backend=backend), ALL_BUT_W), (learned(backend=backend), slice(None))):
        found = gradients(layer, pick(tensors, chosen), grad)
        for g, w in zip(found, pick(wanted, chosen), strict=True):
            assert_close(g, w, dtype, 2 * tokens * dim, grad=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", [(), ("gamma",), ("beta",)])
def test_a_norm_without_weights(backend: str, given: tuple[str, ...]) -> None:
    skip_unless_possible(backend, widest(backend))
    dtype, tensors = widest(backend), make(13, 16, 8, 12)
    literal: list[Any] = list(tensors)
    if "gamma" not in given:
        tensors[4], literal[4] = torch.ones(16, dtype=torch.float64), None
    if "beta" not in given:
        tensors[5], literal[5] = torch.zeros(16, dtype=torch.float64), None
    grad = torch.randn(2, 13, 16, dtype=torch.float64)
    literal = [None if t is None else t.to(dtype) for t in literal]
    assert_close(ops.token_performer(*literal, backend=backend), by_modules(tensors), dtype, 29)
    wanted = backward(grad, *tensors)
    w = literal.pop(1)
    found = gradients(lambda kqv, *t: ops.token_performer(kqv, w, *t, backend=backend), literal, grad)
    for g, expected, t in zip(found, pick(wanted, ALL_BUT_W), literal, strict=True):
        if t is not None:
            assert_close(g, expected, dtype, 400, grad=True)


@pytest.mark.parametrize("backend", IN_FLOAT64)
def test_gradcheck(backend: str) -> None:
    inputs = leaves(*make(3, 4, 2, 5))
    function = learned(backend=backend)
    # The kernels take seconds in the interpreter, and test_forward_and_gradients holds them against the reference.
    fast = backend == "triton"
    assert torch.autograd.gradcheck(function, inputs, fast_mode=fast)
    assert torch.autograd.gradcheck(frozen(inputs, backend=backend), pick(inputs, ALL_BUT_W), fast_mode=fast)
    if backend != "triton":  # whose second derivatives test_second_derivatives.py compares
        assert torch.autograd.gradgradcheck(function, inputs)


def test_gradcheck_of_the_backward_written_by_hand() -> None:
    inputs = leaves(*make(3, 4, 2, 5))
    assert torch.autograd.gradcheck(hand_written(forward, backward, 10), inputs)


@pytest.mark.parametrize("backend", ["aten", "triton"])
@pytest.mark.parametrize("rates", [(0.3, 0.0), (0.0, 0.3), (0.2, 0.4)])
def test_gradcheck_with_dropout(rates: tuple[float, float], backend: str) -> None:
    """The masks of the forward pass are the masks of the backward pass."""

    inputs = leaves(*make(4, 5, 3, 5))
    inputs[1] = inputs[1].detach()

    def function(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        return ops.token_performer(*tensors, *rates, backend=backend)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=backend == "triton")
    if backend == "triton":
        return
    assert torch.autograd.gradgradcheck(function, inputs)
    # Same seed, same masks, with and without gradients, in the literal form too.
    with torch.no_grad():
        torch.manual_seed(3)
        literal = ops.token_performer(*inputs, *rates, backend="reference")
        assert torch.allclose(function(*inputs), literal, rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_rate_and_scale(backend: str) -> None:
    skip_unless_possible(backend, widest(backend))
    tensors = make(300, 16, 8, 16, widest(backend))
    tensors[9] += 100.0  # fc2's bias dominates: what is dropped shows
    kept = ops.token_performer(*tensors, 0.0, 0.25, backend=backend) > 50
    assert abs(kept.double().mean().item() - 0.75) < 0.02
    outputs = [ops.token_performer(*tensors, 0.0, 0.25, backend=backend).mean().item() for _ in range(8)]
    assert len(set(outputs)) == 8
    assert abs(sum(outputs) / 8 - ops.token_performer(*tensors).mean().item()) < 2.0


def masked(batch: int, tokens: int, dim: int, proj_drop: float, mlp_drop: float) -> tuple[Tensor, Tensor, Tensor]:
    """The Triton layer's masks (2, batch, tokens, dim), and what sums gradient times mask should be and are.

    With all weights zero, proj's bias 1 and fc2's bias 4, the layer's output is mask1 + 4 mask2, and the gradients of
    the biases are those sums. The gradient is the number of the token and channel: no two masks have the same sum.
    """
    tensors = [torch.zeros_like(t) for t in make(tokens, dim, 8, dim)]
    tensors[0] = tensors[0][:1].repeat(batch, 1, 1)
    tensors[1] += 0.1
    tensors[3] += 1
    tensors[9] += 4
    biases = [tensors[i].requires_grad_() for i in (3, 9)]
    out = ops.token_performer(*tensors, proj_drop, mlp_drop, backend="triton")
    grad = torch.arange(1.0, out.numel() + 1, dtype=torch.float64).reshape(out.shape)
    sums = torch.stack(torch.autograd.grad(out, biases, grad))
    scale1, scale2 = (65536 / (65536 - round(65536 * rate)) for rate in (proj_drop, mlp_drop))
    second = (out > 3.5 * scale2).double() * scale2
    first = out.detach() - 4 * second
    assert (first.abs().lt(1e-9) | (first - scale1).abs().lt(1e-9)).all()
    first = (first > 0.5).double() * scale1
    return torch.stack((first, second)), torch.stack(((grad * first).sum((0, 1)), (grad * second).sum((0, 1)))), sums


def test_triton_masks_have_the_rate_and_are_independent() -> None:
    batch, tokens, dim, rates = 3, 401, 24, (0.1, 0.37)
    masks, wanted, sums = masked(batch, tokens, dim, *rates)
    # Forward and backward agree value by value, at a tail of tokens and of channels too.
    assert torch.allclose(sums, wanted, rtol=1e-12)
    drops = (masks == 0).double()
    number = drops[0].numel()
    for drop, rate in zip(drops, rates, strict=True):
        deviation = math.sqrt(rate * (1 - rate) / number)
        assert abs(drop.mean() - rate) < 5 * deviation
        for dims in ((1, 2), (0, 2), (0, 1)):  # per image, token and channel
            part = drop.mean(dims)
            assert (part - rate).abs().max() < 5 * deviation * math.sqrt(part.numel())
    # Neither the other mask, nor the neighbouring channel, token or image tells anything.
    centred = [(drop - rate) / math.sqrt(rate * (1 - rate)) for drop, rate in zip(drops, rates, strict=True)]
    pairs = [centred]
    for c in centred:
        pairs += [(c[..., 1:], c[..., :-1]), (c[..., 4:], c[..., :-4]), (c[:, 1:], c[:, :-1]), (c[1:], c[:-1])]
    for left, right in pairs:
        assert abs((left * right).mean()) < 5 / math.sqrt(left.numel())


def test_triton_masks_come_from_the_generator() -> None:
    def draw() -> Tensor:
        return masked(1, 20, 16, 0.5, 0.5)[0]

    torch.manual_seed(5)
    first, second = draw(), draw()
    torch.manual_seed(5)
    assert torch.equal(draw(), first) and torch.equal(draw(), second)
    assert not torch.equal(first, second)
    tensors, state = make(4, 16, 8, 16), torch.get_rng_state()
    ops.token_performer(*tensors, backend="triton")
    assert torch.equal(torch.get_rng_state(), state)  # without dropout, nothing is drawn


@pytest.mark.parametrize("rate", [1e-7, 0.5, 0.99999])
def test_any_rate_keeps_the_expectation(rate: float) -> None:
    masks, wanted, sums = masked(1, 400, 16, rate, rate)
    assert torch.allclose(sums, wanted, rtol=1e-12)
    if rate < 1e-6:
        assert (masks == 1).all()  # below the resolution of 2**-16
    kept = max(2.0**-16, 1 - rate)
    assert abs(masks.mean() - 1) < 5 * math.sqrt((1 - kept) / kept / masks.numel()) + 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_replays_the_masks(backend: str) -> None:
    skip_unless_possible(backend, widest(backend))
    tensors = [t.requires_grad_() for t in make(12, 16, 8, 16, widest(backend))]
    layer, inputs = frozen(tensors, 0.3, 0.3, backend=backend), pick(tensors, ALL_BUT_W)

    def gradients_of(layer: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(11)
        return torch.autograd.grad(layer(*inputs).square().sum(), inputs)

    direct = gradients_of(layer)
    again = gradients_of(lambda *t: checkpoint(layer, *t, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(direct, again, strict=True))


def test_too_wide_for_the_registers() -> None:
    """Beyond 64 channels or hidden units, what follows the attention is left to the library."""
    for dim, hidden in ((72, 16), (16, 72)):
        tensors = make(9, dim, 8, hidden)
        grad = torch.randn(2, 9, dim, dtype=torch.float64)
        found, want = (
            gradients(frozen(tensors, backend=backend), pick(tensors, ALL_BUT_W), grad)
            for backend in ("triton", "reference")
        )
        for f, w in zip(found, want, strict=True):
            assert_close(f, w, torch.float64, 100, grad=True)


@pytest.mark.parametrize("backend", ["triton", "native"])
@pytest.mark.parametrize("std", [0.1, 5.0, 20.0])
def test_any_scale_of_keys_and_queries(std: float, backend: str) -> None:
    """Denominators below float32's smallest number, exponentials above its largest: finite, values and gradients."""
    skip_unless_possible(backend, torch.float32)
    tensors = make(40, 32, 16, 32, torch.float32)
    tensors[0][..., :64] *= std / 0.7
    layer = frozen(tensors, 0.1, 0.1, backend=backend)
    found = gradients(layer, pick(tensors, ALL_BUT_W), torch.randn(2, 40, 32))
    assert all(torch.isfinite(f).all() for f in found)


@pytest.mark.parametrize("backend", ["triton", "native"])
def test_autocast(backend: str) -> None:
    """Triton's operands of the MLP in autocast's dtype, all else as without it; weights and their gradients float32."""
    skip_unless_possible(backend, torch.float32)
    tensors = make(33, 16, 8, 16, torch.float32)
    tensors[0] = tensors[0].half()
    grad = torch.randn(2, 33, 16).half()
    exact = [t.double() for t in tensors]
    wanted = backward(grad.double(), *exact)
    with torch.autocast(grad.device.type, dtype=torch.float16):
        out = ops.token_performer(*tensors, backend=backend)
        found = gradients(frozen(tensors, backend=backend), pick(tensors, ALL_BUT_W), grad)
    assert out.dtype == torch.float16
    assert_close(out, by_modules(exact), torch.float16, 50)
    for f, w, t in zip(found, pick(wanted, ALL_BUT_W), pick(tensors, ALL_BUT_W), strict=True):
        assert f.dtype == t.dtype
        assert_close(f, w, torch.float16, 2 * 33 * 16, grad=True)


def test_needs_less_memory_than_autograd() -> None:
    """What backward keeps: no LayerNorm output, no GELU output, no projected attention."""
    tensors = [t.requires_grad_(i != 1) for i, t in enumerate(make(128, 64, 32, 64, torch.float32))]
    sizes: dict[str, int] = {}
    runs = torch.empty(0).device.type == "cpu" and extension.multiplies("cpu", torch.float32)
    for backend in BACKENDS if runs else IN_FLOAT64:
        seen: dict[int, int] = {}

        def pack(t: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = ops.token_performer(*tensors, backend=backend)
        sizes[backend] = sum(seen.values())
        del out
    assert sizes["aten"] < 0.75 * sizes["reference"]
    assert sizes["triton"] < 0.4 * sizes["reference"]  # the input, the weights, and sums per image
    assert sizes.get("native", 0) < 0.4 * sizes["reference"]


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
