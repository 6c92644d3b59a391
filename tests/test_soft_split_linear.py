"""ops.soft_split_linear: the folded convolution against unfold, LayerNorm and Linear in float64."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    MATMULS,
    TOLERANCES,
    assert_close,
    gradients,
    hand_written,
    leaves,
    rounding_moves,
    skip_unless_possible,
    widest,
    with_dtypes,
)
from torch import Tensor

from t2t_fast import ops
from t2t_fast.bench import samples
from t2t_fast.ops.common import extension
from t2t_fast.ops.common.norm import Norm
from t2t_fast.ops.soft_splits import aten, reference
from t2t_fast.ops.soft_splits.arguments import Geometry, Split

pytestmark = pytest.mark.usefixtures("on_device", "poisoned")

BACKENDS = ("reference", "aten", "triton", "native")
WITH_GRADIENTS = BACKENDS[:3]
# (channels, height, width, kernel, stride, padding, out)
CASES = [
    (3, 19, 33, 7, 4, 2, 24),
    (64, 9, 6, 3, 2, 1, 33),
    (5, 9, 6, (2, 3), (3, 1), (0, 2), 7),
    (6, 5, 5, 1, 1, 0, 3),
    (3, 12, 12, 3, 4, 2, 5),
    (2, 8, 5, (4, 7), 4, (1, 2), 192),  # 16-bit kernels: two blocks of outputs in a program
    (16, 3, 5, 3, 2, 1, 384),
]


def make(case: tuple, tokens: bool, norm: bool = True, bias: bool = True, dtype: torch.dtype = torch.float64) -> Any:
    """(tensors, geometry with grid and eps)."""
    channels, height, width, kernel, stride, padding, out = case
    pairs = Geometry(*(v if isinstance(v, tuple) else (v, v) for v in (kernel, stride, padding)))
    sizes = samples.Sizes(channels=channels, grid=(height, width), as_tokens=tokens, geometry=pairs, out=out)
    without = [*(() if bias else ("bias",)), *(() if norm else ("norm_weight", "norm_bias"))]
    *tensors, kernel, stride, padding, grid = samples.make("soft_split_linear", sizes, dtype, without=without).values()
    return tensors, (kernel, stride, padding, grid, 1e-5)


def run(backend: str, tensors: list[Tensor | None], geometry: tuple) -> Tensor:
    return ops.soft_split_linear(*tensors, *geometry, backend=backend)


def split_of(gamma: Tensor | None, beta: Tensor | None, geometry: tuple) -> Split:
    *pairs, grid, eps = geometry
    return Split(Geometry(*pairs), grid, None if gamma is None else Norm(gamma, beta, eps))


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Any, beta: Any, *geometry: Any) -> Tensor:
    """The definition."""
    return reference.soft_split_linear(x, weight, bias, split_of(gamma, beta, geometry))


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Any, beta: Any, *geometry: Any
) -> tuple[Tensor | None, ...]:
    """The definition's gradients."""
    return reference.soft_split_linear_backward(grad, x, weight, bias, split_of(gamma, beta, geometry))


def double(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize(("backend", "dtype"), with_dtypes(BACKENDS))
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(backend: str, case: tuple, tokens: bool, dtype: torch.dtype) -> None:
    skip_unless_possible(backend, dtype)
    tensors, geometry = make(case, tokens, dtype=dtype)
    want = forward(*double(tensors), *geometry)
    got = run(backend, tensors, geometry)
    n = tensors[1].shape[1]
    assert got.dtype == dtype
    assert_close(got, want, dtype, n)
    if backend not in WITH_GRADIENTS:
        return
    grad = torch.randn_like(want).to(dtype)
    wanted = backward(grad.double(), *double(tensors), *geometry)
    found = gradients(lambda *t: run(backend, list(t), geometry), tensors, grad)
    moves = rounding_moves(lambda *t: backward(grad.double(), *t, *geometry), double(tensors), dtype)
    for g, w, conditioning in zip(found, wanted, moves, strict=True):
        assert_close(g, w, dtype, max(n, want.shape[0] * want.shape[1]), grad=True, conditioning=conditioning)


@pytest.mark.parametrize("backend", BACKENDS)
def test_patches_of_one_value_normalise_to_zero(backend: str) -> None:
    skip_unless_possible(backend, widest(backend))
    tensors, geometry = make((1, 5, 5, 1, 1, 0, 3), False, dtype=widest(backend))
    _, weight, bias, _, beta = double(tensors)
    want = (weight @ beta + bias).expand(2, 25, 3)
    assert_close(run(backend, tensors, geometry), want, widest(backend), 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("norm", "bias"), [(False, True), (False, False), (True, False)])
def test_optional_arguments(backend: str, norm: bool, bias: bool) -> None:
    dtype = widest(backend)
    skip_unless_possible(backend, dtype)
    for tokens in (False, True):
        tensors, geometry = make(CASES[1], tokens, norm, bias, dtype)
        assert_close(run(backend, tensors, geometry), forward(*double(tensors), *geometry), dtype, 576)
    tensors[4] = None  # a LayerNorm without beta
    assert_close(run(backend, tensors, geometry), forward(*double(tensors), *geometry), dtype, 576)


@pytest.mark.parametrize(("backend", "dtype"), with_dtypes(BACKENDS))
@pytest.mark.parametrize("tokens", [False, True])
def test_folded(backend: str, tokens: bool, dtype: torch.dtype) -> None:
    """Weights that hold a LayerNorm already, far from zero and on flat patches too, and the image's gradient."""
    skip_unless_possible(backend, dtype)
    tensors, geometry = make(CASES[1], tokens)
    image, weight, bias, gamma, beta = tensors
    image[0] += 3
    image[1] = 7
    folded = [t.to(dtype) for t in (weight * gamma - (weight * gamma).mean(1, keepdim=True), weight @ beta + bias)]
    inputs = [image.to(dtype), *folded, None, None]
    want = forward(image.to(dtype).double(), weight, bias, gamma, beta, *geometry)
    with torch.no_grad():
        got = ops.soft_split_linear(*inputs, *geometry, folded=True, backend=backend)
    assert got.dtype == dtype
    assert_close(got, want, dtype, 576)
    if dtype == torch.float64:
        x = image + torch.randn_like(image)
        grad = torch.randn_like(want)
        (found,) = gradients(
            lambda x: ops.soft_split_linear(x, *inputs[1:], *geometry, folded=True, backend=backend), [x], grad
        )
        assert_close(found, backward(grad, x, *tensors[1:], *geometry)[0], dtype, 576, grad=True)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_gradcheck(tokens: bool, norm: bool) -> None:
    tensors, geometry = make((2, 3, 4, 3, 2, 1, 3), tokens, norm)
    inputs = leaves(*tensors)
    for backend in WITH_GRADIENTS:
        fast = backend == "triton" and (tokens or not norm)  # the interpreter takes its time
        assert torch.autograd.gradcheck(lambda *t, b=backend: run(b, list(t), geometry), inputs, fast_mode=fast)
    assert torch.autograd.gradcheck(hand_written(forward, backward, 5), (*inputs, *geometry))
    for backend in ("reference", "aten"):
        assert torch.autograd.gradgradcheck(lambda *t, b=backend: run(b, list(t), geometry), inputs)


def odd_geometries() -> list[tuple]:
    """Cases in which no size is a multiple of a block: strides below, at and above the kernel, all paddings."""
    cases = []
    for height, channels, kernel in itertools.product((1, 5, 31, 57), (1, 3, 5, 64), (1, 2, 3, 7)):
        for stride, padding in itertools.product((max(1, kernel - 1), kernel, kernel + 1), range(kernel)):
            width = 59 - height // 2
            rows, cols = ((n + 2 * padding - kernel) // stride + 1 for n in (height, width))
            # The interpreter takes its time: what is left of large sizes is those with few windows.
            few = rows * cols <= 300 and rows * cols * channels * kernel**2 <= 20_000
            if height + 2 * padding >= kernel and few:
                cases.append((channels, height, width, kernel, stride, padding, 17))
    return random.Random(3).sample(cases, 40)


@pytest.mark.parametrize("case", odd_geometries(), ids=str)
def test_odd_geometries(case: tuple) -> None:
    tokens, dtype = case[1] % 2 == 0 or case[0] > 3, torch.float64 if case[4] % 2 else torch.float32
    tensors, geometry = make(case, tokens, norm=case[3] > 1, dtype=dtype)
    want = forward(*double(tensors), *geometry)
    n = tensors[1].shape[1]
    assert_close(run("triton", tensors, geometry), want, dtype, n)
    for narrow in MATMULS if want.device.type == "cpu" else ():
        if extension.multiplies("cpu", narrow):
            fewer = [None if t is None else t.to(narrow) for t in tensors]
            assert_close(run("native", fewer, geometry), forward(*double(fewer), *geometry), narrow, n)
    grad = torch.randn_like(want).to(dtype)
    wanted = backward(grad.double(), *double(tensors), *geometry)
    found = gradients(lambda *t: run("triton", list(t), geometry), tensors, grad)
    moves = rounding_moves(lambda *t: backward(grad.double(), *t, *geometry), double(tensors), dtype)
    for g, w, conditioning in zip(found, wanted, moves, strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            assert_close(g, w, dtype, max(n, want.shape[0] * want.shape[1]), grad=True, conditioning=conditioning)


def test_any_memory_format_in_triton() -> None:
    (x, *weights), geometry = make((5, 9, 12, 3, 2, 1, 7), False)
    want = forward(x, *weights, *geometry)
    grad = torch.randn_like(want)
    wanted = backward(grad, x, *weights, *geometry)[0]
    padded = torch.randn(4, 7, 20, 30, dtype=x.dtype)
    padded[::2, 1:6, 3:12, 2:26:2] = x
    views = {
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "flipped batch and sliced": padded[::2, 1:6, 3:12, 2:26:2],
    }
    for name, view in views.items():
        torch.testing.assert_close(run("triton", [view, *weights], geometry), want, msg=name)
        (found,) = gradients(lambda image: run("triton", [image, *weights], geometry), [view], grad)
        torch.testing.assert_close(found, wanted, msg=name)
    weight, bias, gamma, beta = weights
    strided = [weight.t().contiguous().t(), torch.stack((bias, bias), 1)[:, 0], gamma.flip(0).flip(0), beta]
    for name, tensors in {"weights": strided, "one bias": [weight, bias[:1].expand(7), gamma, None]}.items():
        plain = [None if t is None else t.contiguous() for t in tensors]
        torch.testing.assert_close(run("triton", [x, *tensors], geometry), forward(x, *plain, *geometry), msg=name)
    aligned = torch.randn(16, 8, dtype=x.dtype).t()  # rows of 16 values, which need no padding
    image = torch.randn(2, 4, 6, 6, dtype=x.dtype)
    got = ops.soft_split_linear(image, aligned, bias[:1].expand(8), None, None, 2, 2, 0, backend="triton")
    want_ = ops.soft_split_linear(image, aligned, bias[:1].expand(8), None, None, 2, 2, 0, backend="reference")
    torch.testing.assert_close(got, want_)
    expanded = x[:1, :1].expand(3, 5, 9, 12)
    got = run("triton", [expanded, *weights], geometry)
    torch.testing.assert_close(got, forward(expanded, *weights, *geometry))
    one = torch.ones((), dtype=x.dtype).expand_as(want)  # what sum().backward() passes
    (found,) = gradients(lambda image: run("triton", [image, *weights], geometry), [x], one)
    torch.testing.assert_close(found, backward(one, x, *weights, *geometry)[0])


def test_large_mean_and_small_deviation_in_triton() -> None:
    """Mean 1000, standard deviation 1e-3: the variance comes from differences to a value of the patch."""
    tensors, geometry = make((3, 40, 40, 7, 4, 0, 24), False, dtype=torch.float32)
    tensors[0] = 1000 + 1e-3 * torch.randn(2, 3, 40, 40)
    want = forward(*double(tensors), *geometry)
    assert_close(run("triton", tensors, geometry), want, torch.float32, 147)
    rounding = 2**-53 * 1000 / 1e-3  # of the input itself
    assert_close(run("triton", double(tensors), geometry), want, torch.float64, 147, conditioning=rounding)


def test_float16_where_factors_leave_its_range_in_triton() -> None:
    """rstd of 100 on gradients of 1000, as a loss scale makes them; values 100,000 away from a window's others."""
    tensors, geometry = make((8, 10, 10, 3, 2, 1, 8), False, dtype=torch.float16)
    tensors[0], tensors[1] = 1e-2 * tensors[0], tensors[1] / 16
    want = forward(*double(tensors), *geometry)
    grad = (1000 * torch.randn(want.shape)).half()
    wanted = backward(grad.double(), *double(tensors), *geometry)
    assert 1e3 < wanted[0].abs().max() < 6e4
    found = gradients(lambda *t: run("triton", list(t), geometry), tensors, grad)
    assert_close(found[0], wanted[0], torch.float16, 72, grad=True)
    tensors[0] = torch.where(torch.rand(tensors[0].shape) < 0.5, 6e4, -6e4).half()
    want = forward(*double(tensors), *geometry)
    assert_close(run("triton", tensors, geometry), want, torch.float16, 72)


@pytest.mark.parametrize("name", ["constant", "nearly constant", "one hot pixel", "two flat halves"])
def test_gradients_on_flat_images_in_triton(name: str) -> None:
    (_, *weights), geometry = make((3, 48, 48, 7, 4, 2, 24), False, dtype=torch.float32)
    x = flat_images()[name].float()
    exact = double([x, *weights])
    grad = torch.randn(1, 12 * 12, 24)
    wanted = backward(grad.double(), *exact, *geometry)
    found = gradients(lambda *t: run("triton", list(t), geometry), [x, *weights], grad)
    moves = rounding_moves(lambda *t: backward(grad.double(), *t, *geometry), exact, torch.float32)
    for g, w, conditioning in zip(found, wanted, moves, strict=True):
        assert_close(g, w, torch.float32, 147, grad=True, conditioning=conditioning)


def flat_images() -> dict[str, Tensor]:
    steps = torch.arange(48 * 48).view(1, 1, 48, 48) % 7
    half = torch.full((1, 3, 48, 48), 2.2)
    half[..., 20:] = -1.5
    hot = torch.zeros(1, 3, 48, 48)
    hot[0, 1, 20, 31] = 1.0
    return {
        "zero": torch.zeros(1, 3, 48, 48),
        "constant": torch.full((1, 3, 48, 48), 2.1875),
        "nearly constant": torch.full((1, 3, 48, 48), 2.0) + 1e-3 * torch.randn(1, 3, 48, 48),
        "two flat halves": half,
        "one hot pixel": hot,
        "bright steps": (500.0 + steps / 8).expand(1, 3, 48, 48).clone(),
    }


# 16-bit matmuls cannot hold means beyond 100 standard deviations: the bright steps are for float32 and float64.
FLAT_CASES = [(name, dtype) for dtype in (torch.float64, torch.float32) for name in flat_images()]
FLAT_CASES += [(n, dtype) for dtype in (torch.float16, torch.bfloat16) for n in flat_images() if n != "bright steps"]


@pytest.mark.parametrize(("name", "dtype"), FLAT_CASES)
def test_flat_images(name: str, dtype: torch.dtype) -> None:
    """Sky and padding: the variance must not cancel, and rounded weights must not leak the patch's mean."""
    (_, weight, bias, gamma, beta), geometry = make((3, 48, 48, 7, 4, 2, 24), False, dtype=dtype)
    x = flat_images()[name].to(dtype)
    exact = double([x, weight, bias, gamma, beta])
    want = forward(*exact, *geometry)
    tested = [b for b in ("aten", "triton") if b == "aten" or torch.cuda.is_available() or dtype != torch.bfloat16]
    tested += ["native"] if extension.multiplies(x.device.type, dtype) else []
    error = {b: (run(b, [x, weight, bias, gamma, beta], geometry).double() - want).abs().max().item() for b in tested}
    # What one float32 rounding of the image does to the exact output: float32 sums cannot promise better.
    exact[0] = exact[0] * (1 + 2**-24 * torch.randn(x.shape, dtype=torch.float64))
    conditioning = (forward(*exact, *geometry) - want).abs().max().item()
    unit, rounding = TOLERANCES[dtype].unit, 2**-24 if dtype != torch.float64 else 2**-53
    bound = 8 * unit * (1 + 147**0.5) * want.abs().max().item()
    assert max(error.values()) <= bound + 16 * conditioning * rounding / 2**-24


@pytest.mark.parametrize("value", [2.2, 255.0, -1e4])
# The literal form keeps the rounding of its mean.
@pytest.mark.parametrize(
    ("backend", "dtype"), [c for c in with_dtypes(BACKENDS) if c[0] != "reference" and c[1] != torch.float64]
)
def test_constant_patches_are_exact(backend: str, dtype: torch.dtype, value: float) -> None:
    """Their rstd is over 300, and would make a token of what rounding leaves of W_c u."""
    skip_unless_possible(backend, dtype)
    tensors, geometry = make((3, 24, 24, 7, 4, 0, 24), False, dtype=dtype)
    tensors[0] = torch.full((2, 3, 24, 24), value, dtype=dtype)
    constant = run(backend, tensors, geometry)
    assert_close(constant, forward(*double(tensors), *geometry), dtype, 147)
    if backend not in WITH_GRADIENTS:
        return
    # Beside patches that vary they give the weights no gradient.
    tensors[0][1] = torch.randn(3, 24, 24)
    grad = torch.randn(constant.shape, dtype=torch.float64).to(dtype)
    wanted = backward(grad.double(), *double(tensors), *geometry)[1:]
    found = gradients(lambda *t: run(backend, [tensors[0], *t], geometry), tensors[1:], grad)
    moves = rounding_moves(
        lambda *t: backward(grad.double(), tensors[0].double(), *t, *geometry)[1:],
        double(tensors[1:]),
        dtype,
    )
    for g, w, conditioning in zip(found, wanted, moves, strict=True):
        assert_close(g, w, dtype, 147, grad=True, conditioning=conditioning)


def test_variance_of_patches_survives_a_large_mean() -> None:
    x = (1000 + 1e-3 * torch.randn(2, 3, 40, 40, dtype=torch.float64)).float()
    _, rstd, _ = aten.window_statistics(x, Geometry((7, 7), (4, 4), (0, 0)), 1e-5)
    windows = F.unfold(x.double(), 7, stride=4).transpose(1, 2)
    want = torch.rsqrt(windows.var(-1, correction=0, keepdim=True) + 1e-5)
    # A float32 mean near 1000 is off by up to 3e-5, which adds (3e-5 / 1e-3)**2 to the variance, relatively.
    torch.testing.assert_close(rstd.flatten(1).unsqueeze(2).double(), want, rtol=3e-3, atol=0)


@pytest.mark.parametrize(("backend", "dtype"), [c for c in with_dtypes(BACKENDS) if c[1].itemsize == 2])
def test_autocast(backend: str, dtype: torch.dtype) -> None:
    skip_unless_possible(backend, dtype)
    tensors, geometry = make(CASES[0], False, dtype=torch.float32)
    want = forward(*double(tensors), *geometry)
    grad = torch.randn_like(want).to(dtype)
    with torch.autocast(want.device.type, dtype=dtype):
        got = run(backend, tensors, geometry)
        differentiated = backend in WITH_GRADIENTS
        found = gradients(lambda *t: run(backend, list(t), geometry), tensors, grad) if differentiated else []
    assert got.dtype == dtype
    assert_close(got, want, dtype, 147)
    if not differentiated:
        return
    for g, w, t in zip(found, backward(grad.double(), *double(tensors), *geometry), tensors, strict=True):
        assert g.dtype == t.dtype
        assert_close(g, w, dtype, 147, grad=True)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_without_convolutions(case: tuple, norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What float32 on CUDA does while cuDNN could take TF32: matmuls over patches in place of the convolution."""
    tensors, geometry = make(case, False, norm)
    monkeypatch.setattr(aten, "_convolves_in_tf32", lambda image: True)
    assert_close(run("aten", tensors, geometry), forward(*tensors, *geometry), torch.float64, 576)
    grad = torch.randn_like(forward(*tensors, *geometry))
    wanted = backward(grad, *tensors, *geometry)
    found = gradients(lambda *t: run("aten", list(t), geometry), tensors, grad)
    for g, w in zip(found, wanted, strict=True):
        if w is not None:
            assert_close(g, w, torch.float64, 576, grad=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(backend: str, batch: int) -> None:
    skip_unless_possible(backend, widest(backend))
    tensors, geometry = make(CASES[0], False, dtype=widest(backend))
    tensors[0] = tensors[0][:batch]
    assert run(backend, tensors, geometry).shape == (batch, 5 * 8, 24)


def test_bad_input_is_named() -> None:
    tensors, geometry = make(CASES[0], False)
    x, weight, bias, gamma, beta = tensors
    with pytest.raises(ValueError, match=r"weight must have shape \(out, C\*kh\*kw\) = \(24, 147\), got \(24, 146\)"):
        run("auto", [x, weight[:, 1:], bias, gamma, beta], geometry)
    with pytest.raises(ValueError, match=r"bias must have shape \(out,\) = \(24,\), got \(23,\)"):
        run("auto", [x, weight, bias[1:], gamma, beta], geometry)
    with pytest.raises(ValueError, match=r"norm_bias was given without norm_weight"):
        run("auto", [x, weight, bias, None, beta], geometry)
    tensors[4] = torch.zeros(147, dtype=x.dtype)
    with pytest.raises(ValueError, match=r"folded=True .*norm_weight=N"):
        ops.soft_split_linear(*tensors[:3], torch.ones(147, dtype=x.dtype), *tensors[4:], *geometry, folded=True)
    with pytest.raises(ValueError, match=r"folded=True is for inference, and weight requires a gradient"):
        ops.soft_split_linear(*leaves(*tensors[:3]), None, None, *geometry, folded=True)
