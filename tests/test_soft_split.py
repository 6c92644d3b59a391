"""ops.soft_split: against torch.nn.functional.unfold on float64, its adjoint, odd geometries and bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import gradients, hand_written, leaves, skip_unless_possible
from torch import Tensor

from t2t_fast import BackendUnavailable, ops
from t2t_fast.ops.soft_splits import output_grid, reference
from t2t_fast.ops.soft_splits.arguments import Geometry

pytestmark = pytest.mark.usefixtures("on_device", "poisoned")

BACKENDS = ("reference", "aten", "triton")
# (channels, height, width, kernel, stride, padding)
CASES = [
    (3, 31, 57, 7, 4, 2),
    (1, 5, 5, 3, 2, 1),
    (5, 9, 4, (2, 3), (3, 1), (0, 2)),
    (64, 8, 7, 3, 2, 1),
    (2, 1, 6, 1, 1, 0),
    (3, 12, 12, 2, 5, 1),
    (4, 6, 6, 3, 3, 0),
]


def windows_by_hand(x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """Every window cut out by slicing: slow and obvious."""
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    rows = range(0, x.shape[2] - kernel[0] + 1, stride[0])
    columns = range(0, x.shape[3] - kernel[1] + 1, stride[1])
    return torch.stack([x[:, :, i : i + kernel[0], j : j + kernel[1]].flatten(1) for i in rows for j in columns], dim=1)


def pairs(*values: int | tuple[int, int]) -> list[tuple[int, int]]:
    return [v if isinstance(v, tuple) else (v, v) for v in values]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_forward_is_exact(backend: str, case: tuple, dtype: torch.dtype) -> None:
    skip_unless_possible(backend, dtype)
    channels, height, width, kernel, stride, padding = case
    x = torch.randn(2, channels, height, width).to(dtype)
    want = windows_by_hand(x, *pairs(kernel, stride, padding))
    for image in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(ops.soft_split(image, kernel, stride, padding, backend=backend), want)
    tokens = x.flatten(2).transpose(1, 2)
    for view in (tokens, tokens.contiguous()):
        got = ops.soft_split(view, kernel, stride, padding, grid=(height, width), backend=backend)
        assert torch.equal(got, want)
    grid = output_grid((height, width), kernel, stride, padding)
    assert want.shape[1] == grid[0] * grid[1]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [False, True])
def test_backward_is_the_adjoint(case: tuple, tokens: bool) -> None:
    channels, height, width, kernel, stride, padding = case
    geometry = Geometry(*pairs(kernel, stride, padding))
    grid = (height, width) if tokens else None
    shape = (2, height * width, channels) if tokens else (2, channels, height, width)
    x = torch.randn(shape, dtype=torch.float64)
    out = reference.soft_split(x, geometry, grid)
    grad = torch.randn_like(out)
    dx = reference.soft_split_backward(grad, shape, geometry, grid)
    torch.testing.assert_close((out * grad).sum(), (x * dx).sum(), rtol=1e-12, atol=1e-10)
    for backend in BACKENDS:
        (found,) = gradients(lambda x, b=backend: ops.soft_split(x, *geometry, grid=grid, backend=b), [x], grad)
        torch.testing.assert_close(found, dx, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    (x,) = leaves(torch.randn(1, 2, 4, 3) if backend == "triton" else torch.randn(1, 2, 5, 4))
    function = lambda x: ops.soft_split(x, 3, 2, 1, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))
    geometry = Geometry((3, 3), (2, 2), (1, 1))
    by_hand = hand_written(
        lambda x: reference.soft_split(x, geometry, None),
        lambda grad, x: reference.soft_split_backward(grad, tuple(x.shape), geometry, None),
        1,
    )
    assert torch.autograd.gradcheck(by_hand, (x,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(backend: str, batch: int) -> None:
    assert ops.soft_split(torch.randn(batch, 3, 32, 32), 7, 4, 2, backend=backend).shape == (batch, 64, 147)


def test_bad_input_is_named() -> None:
    x = torch.randn(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"stride must be at least 1, got 0"):
        ops.soft_split(x, 3, 0, 1)
    with pytest.raises(ValueError, match=r"padding must be at least 0, got -1"):
        ops.soft_split(x, 3, 1, -1)
    with pytest.raises(TypeError, match=r"kernel_size must be an int or a pair of ints, got 3\.5"):
        ops.soft_split(x, 3.5, 1, 1)
    with pytest.raises(ValueError, match=r"kernel_size=\(20, 20\) does not fit"):
        ops.soft_split(x, 20, 1, 1)
    with pytest.raises(ValueError, match=r"x has 16 tokens, grid=\(3, 5\) needs 15"):
        ops.soft_split(torch.randn(2, 16, 8), 3, 1, 1, grid=(3, 5))
    with pytest.raises(ValueError, match=r"x must have 4 dimensions, got 3"):
        ops.soft_split(torch.randn(2, 16, 8), 3, 1, 1)
    with pytest.raises(TypeError, match=r"x has dtype torch\.int64"):
        ops.soft_split(torch.zeros(1, 3, 8, 8, dtype=torch.int64), 3, 1, 1)
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got list"):
        ops.soft_split([1.0], 3, 1, 1)
    with pytest.raises(BackendUnavailable, match=r"soft_split has no 'native' implementation"):
        ops.soft_split(x, 3, 1, 1, backend="native")
    with pytest.raises(ValueError, match=r"backend='cuda' is unknown; accepted: auto, reference"):
        ops.soft_split(x, 3, 1, 1, backend="cuda")
