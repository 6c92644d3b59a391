"""The extension's attention, Performer layer and soft split on the CPU: sizes, layouts, odd values, derivatives."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from cpu_kernels import (
    DIFFERENTIABLE,
    NATIVE,
    OPS,
    attend,
    attention,
    make,
    skip_unless_native_runs,
    step,
    weights_for,
)
from helpers import MATMULS, assert_close, rounding_moves
from torch import Tensor

from t2t_fast import BackendUnavailable, ops
from t2t_fast.bench.samples import Sizes
from t2t_fast.ops.soft_splits.arguments import Geometry

# Several blocks of keys and queries, several parts of both.
LARGE = Sizes(batch=2, heads=2, tokens=900, dim=19, features=21, hidden=35, channels=5, grid=(40, 37))


@pytest.fixture(autouse=True)
def _possible(request: pytest.FixtureRequest) -> None:
    skip_unless_native_runs(request)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def assert_right(function: Any, tensors: Sequence[Tensor], dtype: torch.dtype, reduction: int) -> None:
    """Result and gradients against the reference in float64, as far as rounding the inputs leaves them determined."""
    exact = [t.double() for t in tensors]
    moves = rounding_moves(lambda *t: step(function, t, "reference"), exact, dtype)
    for i, (got, want) in enumerate(zip(step(function, tensors), step(function, exact, "reference"), strict=True)):
        assert_close(got, want, dtype, reduction, grad=i > 0, conditioning=moves[i])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", MATMULS, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 2, 1),
        (2, 3, 5, 7, 3),
        (1, 2, 49, 385, 17),
        (1, 1, 300, 1000, 33),
        (3, 5, 48, 48, 16),
        (70, 1, 3, 2, 5),
        (1, 3, 257, 1, 2),
    ],
    ids=str,
)
def test_attention_of_any_size(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    function, tensors = attend(0.4), attention(*sizes, dtype)
    if sizes[3] > 1:
        return assert_right(function, tensors, dtype, max(sizes) * sizes[-1])
    # The softmax of one score: the gradients of queries and keys vanish.
    assert_close(function(*tensors, **NATIVE), tensors[2].double().expand_as(tensors[0]), dtype, 1)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", MATMULS, ids=str)
@pytest.mark.parametrize("scale", [0.0, -0.7, 1e-46, 9.0, -1e4])
def test_attention_with_any_scale(scale: float, dtype: torch.dtype) -> None:
    tensors = attention(1, 2, 61, 403, 9, dtype)
    if scale in (0.0, -0.7, 9.0):
        return assert_right(attend(scale), tensors, dtype, 403 * 9)
    # All weights equal, or one of each row 1: float32 has no smaller gradients, and float64 other rounding.
    exact = [t.double() for t in tensors]
    assert_close(attend(scale)(*tensors, **NATIVE), attend(scale)(*exact, backend="reference"), dtype, 403)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("batch", "tokens", "dim", "features", "hidden"),
    [(1, 1, 1, 1, 1), (3, 2, 5, 3, 1), (1, 800, 17, 7, 33), (40, 3, 16, 16, 48), (2, 49, 66, 70, 5)],
)
def test_performer_of_any_size(
    batch: int, tokens: int, dim: int, features: int, hidden: int, dtype: torch.dtype
) -> None:
    sizes = Sizes(batch=batch, tokens=tokens, dim=dim, features=features, hidden=hidden)
    function, tensors = make("token_performer", sizes, dtype)
    if dim == 1:  # a LayerNorm of one channel has no slope: what is left is rounding
        want = function(*(t.double() for t in tensors), backend="reference")
        return assert_close(function(*tensors, **NATIVE), want, dtype, 1)
    assert_right(function, tensors, dtype, batch * tokens * max(dim, hidden))


def geometries() -> list[Any]:
    """Kernels above, at and below the stride, a single window, and windows that lie beside the image."""
    pairs = [((3, 3), (2, 2), (1, 1)), ((2, 3), (3, 1), (0, 2)), ((1, 1), (4, 5), (0, 0)), ((9, 8), (1, 1), (0, 0))]
    pairs += [((2, 2), (2, 2), (5, 4))]
    return [(Geometry(*pair), channels) for pair, channels in itertools.product(pairs, (1, 2, 3, 15, 16, 17, 33))]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", MATMULS, ids=str)
@pytest.mark.parametrize(("geometry", "channels"), geometries(), ids=str)
def test_windows_of_any_layout(geometry: Geometry, channels: int, dtype: torch.dtype) -> None:
    """The neighbours of a view in memory are NaN: none of them may be read."""
    sizes = Sizes(channels=channels, grid=(9, 8), geometry=geometry, out=channels + 2)
    function, (x, *weights) = make("soft_split_linear", sizes, dtype)
    want = function(x.double(), *(t.double() for t in weights), backend="reference")
    lines = torch.full((2, 9, 8, channels + 1), torch.nan, dtype=dtype)
    lines[..., :channels] = x.permute(0, 2, 3, 1)
    wide = torch.full((3, channels + 2, 11, 17), torch.nan, dtype=dtype)
    wide[:2, 1:-1, 1:-1, :16:2] = x
    views = {
        "contiguous": x,
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "channels of a wider image": lines[..., :channels].permute(0, 3, 1, 2),
        "cut out of a larger image": wide[:2, 1:-1, 1:-1, :16:2],
    }
    for name, view in views.items():
        torch.testing.assert_close(view, x, msg=name)
        assert_close(function(view, *weights, **NATIVE), want, dtype, weights[0].shape[1])
    one = x[:1, :1, :1].expand(4, channels, 9, 8)
    got = function(one, *weights, **NATIVE)
    assert torch.equal(got, function(one.contiguous(), *weights, **NATIVE))


@pytest.mark.parametrize("dtype", MATMULS, ids=str)
def test_the_last_channels_of_an_image_end_its_memory(dtype: torch.dtype) -> None:
    """An odd number of channels from the second on: nothing lies behind the last pixel's."""
    function, (x, *weights) = make("soft_split_linear", Sizes(channels=3, grid=(9, 8)), dtype)
    lines = torch.randn(2, 9, 8, 4).to(dtype)
    view = lines[..., 1:].permute(0, 3, 1, 2)
    view.copy_(x)
    assert torch.equal(function(view, *weights, **NATIVE), function(x, *weights, **NATIVE))


@pytest.mark.parametrize("dtype", MATMULS, ids=str)
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_strided_and_expanded_tokens(op: str, dtype: torch.dtype) -> None:
    function, tensors = make(op, dtype=dtype)
    want = step(function, tensors)
    for dims in ((1, 2), (0, -1), (-2, -1)):
        views = [t.transpose(*dims).contiguous().transpose(*dims) if t.ndim > 2 else t for t in tensors]
        views = [torch.stack((t, t), -1)[..., 0] if t.ndim <= 2 else t for t in views]
        for got, w in zip(step(function, views), want, strict=True):
            assert torch.equal(got, w)
    expanded = [t[:1].expand_as(t) if t.ndim > 2 else t for t in tensors]
    for got, w in zip(step(function, expanded), step(function, [t.contiguous() for t in expanded]), strict=True):
        assert torch.equal(got, w)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_gradients_of_some(op: str) -> None:
    function, tensors = make(op)
    _, *want = step(function, tensors)
    for i in range(len(tensors)):
        some = [t.detach().requires_grad_(j == i) for j, t in enumerate(tensors)]
        y = function(*some, **NATIVE)
        y.backward(weights_for(y))
        assert [t.grad is not None for t in some] == [j == i for j in range(len(tensors))]
        assert torch.equal(some[i].grad, want[i])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", MATMULS, ids=str)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_attention_passes_on_nan_and_infinity(which: int, dtype: torch.dtype, value: float) -> None:
    """NaN where the reference has NaN, and nowhere else; in the gradients too."""
    tensors = attention(2, 2, 61, 403, 5, dtype)
    tensors[0], tensors[1] = tensors[0].abs(), tensors[1].abs()  # an infinite key is all queries' best, or worst
    tensors[which][0, 1, 40, 3] = value
    for got, want in zip(step(attend(0.3), tensors), step(attend(0.3), tensors, "reference"), strict=True):
        assert torch.equal(got.isnan(), want.isnan())
    if which == 1 and value == -torch.inf:
        tensors[1][0, 0, :390, 2] = tensors[1][1, 0, :, 2] = value  # a whole block of keys, and all keys of a head
        got, want = (attend(0.3)(*tensors, backend=b) for b in ("native", "reference"))
        assert torch.equal(got.isnan(), want.isnan()) and not got[0].isnan().any() and got[1, 0].isnan().all()
        assert_close(got[0], want[0], dtype, 403)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("column", [0, 16, 32], ids=["key", "query", "value"])
def test_performer_passes_on_nan_and_infinity(column: int, value: float) -> None:
    function, tensors = make("token_performer", Sizes(batch=3, tokens=53, dim=16, features=5, hidden=7))
    tensors[0][1, 4, column + 3] = value
    (y, d_kqv, *_), (want, wanted, *_) = (step(function, tensors, backend) for backend in ("native", "reference"))
    assert torch.equal(y.isnan(), want.isnan()) and not y[0].isnan().any()
    assert torch.equal(d_kqv.isnan(), wanted.isnan()) and not d_kqv[2].isnan().any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", MATMULS, ids=str)
@pytest.mark.parametrize("channels", [3, 17])
def test_windows_pass_on_nan_and_infinity(channels: int, dtype: torch.dtype, value: float) -> None:
    function, tensors = make("soft_split_linear", Sizes(channels=channels, grid=(20, 21)), dtype)
    tensors[0][1, 2, 11, 12] = value
    got, want = function(*tensors, **NATIVE), function(*tensors, backend="reference")
    assert torch.equal(got.isnan(), want.isnan()) and 0 < got.isnan().sum() < 5 * 23
    tensors = [*tensors[:3], *([None] * 2)]  # without a LayerNorm
    got, want = (ops.soft_split_linear(*tensors, 3, 2, 1, backend=b) for b in ("native", "reference"))
    assert torch.equal(got.isfinite(), want.isfinite())


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", MATMULS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_bit_for_bit_with_any_number_of_threads(op: str, dtype: torch.dtype) -> None:
    function, tensors = make(op, LARGE, dtype)
    results = []
    for number in (1, 2, 3, 2):
        torch.set_num_threads(number)
        results.append(step(function, tensors))
    for other in results[1:]:
        assert all(torch.equal(got, want) for got, want in zip(other, results[0], strict=True))


def test_nothing_to_attend() -> None:
    """No images, no queries, no keys: shapes of the reference, and zeros."""
    for shape in ((0, 2, 5, 7, 4), (2, 2, 0, 7, 4), (2, 2, 5, 0, 4), (2, 0, 5, 7, 4)):
        tensors = attention(*shape, torch.float32)
        for got, want in zip(step(attend(0.5), tensors), step(attend(0.5), tensors, "reference"), strict=True):
            assert torch.equal(got, want)
    with pytest.raises(BackendUnavailable, match="there are no tokens"):
        function, (kqv, *weights) = make("token_performer")
        function(kqv[:0], *weights, **NATIVE)
    assert function(kqv[:0], *weights).shape == (0, 19, 24)


def wrong(function: Callable[..., Tensor], index: int) -> Callable[..., Tensor]:
    """The same value, and one gradient that is a fifth too large."""
    return lambda *tensors: function(
        *(1.2 * t - (0.2 * t).detach() if i == index else t for i, t in enumerate(tensors)), **NATIVE
    )


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double precision")
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_gradcheck_in_float32(op: str) -> None:
    """Steps of 1e-2: differences are off by their square and by 1e-7 / 1e-2, both far below values near 1."""
    function, tensors = make(op, Sizes(batch=1, tokens=3, heads=2, dim=4, features=3, hidden=5))
    every = tuple(t.contiguous().requires_grad_() for t in tensors)
    check = {"eps": 1e-2, "atol": 4e-3, "rtol": 2e-2, "nondet_tol": 0.0}
    assert torch.autograd.gradcheck(lambda *t: function(*t, **NATIVE), every, **check)
    for index in range(len(every)):
        assert not torch.autograd.gradcheck(wrong(function, index), every, raise_exception=False, **check)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_second_derivatives(op: str) -> None:
    """A Hessian-vector product against that of the reference in float64."""
    function, tensors = make(op, Sizes(tokens=70, heads=2, dim=8, features=6, hidden=7))

    def second(inputs: list[Tensor], backend: str) -> list[Tensor]:
        every = [t.detach().requires_grad_() for t in inputs]
        first = torch.autograd.grad(function(*every, backend=backend).square().sum(), every, create_graph=True)
        total = sum((g * torch.linspace(-1, 1, g.numel()).reshape(g.shape).to(g)).sum() for g in first)
        return list(torch.autograd.grad(total, every))

    exact = second([t.double() for t in tensors], "reference")
    for got, want in zip(second(tensors, "native"), exact, strict=True):
        assert (got - want).norm() < 1e-4 * want.norm()


def test_masks_are_those_of_the_library() -> None:
    function, tensors = make("token_performer")
    results = []
    for backend in ("native", "aten"):
        torch.manual_seed(5)
        results.append(step(lambda *t, **b: function(*t, proj_drop=0.3, mlp_drop=0.4, **b), tensors, backend))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(results[0][0], function(*tensors))
