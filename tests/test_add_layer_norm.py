"""ops.add_layer_norm against a float64 formula: sums, norms, gradients, stochastic depth, mixed dtypes."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, leaves, rounding_moves, skip_unless_possible
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import t2t_fast
from t2t_fast import ops
from t2t_fast.bench import samples
from t2t_fast.ops.block import reference
from t2t_fast.ops.block.triton import why_not_auto_add_layer_norm
from t2t_fast.ops.common.norm import Norm

BACKENDS = ("reference", "aten", "triton")
EPS = 1e-5


def make(images: int, tokens: int, dim: int, affine: bool = True) -> list[Tensor | None]:
    sizes, without = (
        samples.Sizes(batch=images, tokens=tokens, channels=dim),
        () if affine else ("norm_weight", "norm_bias"),
    )
    return list(samples.make("add_layer_norm", sizes, without=without).values())


def formula(
    x: Tensor, y: Tensor, gamma: Tensor | None, beta: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    s = x + (y if scale is None else y * scale[:, None, None])
    centred = s - s.mean(-1, keepdim=True)
    z = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    return s, (z if gamma is None else z * gamma) + (0 if beta is None else beta)


def defined_backward(
    d_total: Tensor,
    d_normed: Tensor,
    x: Tensor,
    y: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor | None, ...]:
    return reference.add_layer_norm_backward(d_total, d_normed, x, y, Norm(gamma, beta, EPS), scale)


@pytest.mark.usefixtures("poisoned", "on_device")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 19, 32), (3, 5, 70), (1, 1, 3), (0, 4, 6), (2, 50, 384)])
@pytest.mark.parametrize(("affine", "scaled"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_forward_and_gradients(
    backend: str, shape: tuple[int, int, int], affine: bool, scaled: bool, dtype: torch.dtype
) -> None:
    tensors = [None if t is None else t.to(dtype) for t in make(*shape, affine)]
    skip_unless_possible(backend, dtype)
    scale = torch.linspace(0, 1.25, shape[0], dtype=dtype) if scaled else None
    exact = [None if t is None else t.double() for t in (*tensors, scale)]
    want = formula(*exact)
    moves = rounding_moves(lambda *t: formula(*t), exact, dtype) if shape[0] else [0.0, 0.0]
    inputs = [None if t is None else t.requires_grad_() for t in tensors]
    got = ops.add_layer_norm(*inputs, branch_scale=scale, backend=backend)
    with torch.no_grad():
        again = ops.add_layer_norm(*inputs, branch_scale=scale, backend=backend)
    for g, same, w, moved in zip(got, again, want, moves, strict=True):
        assert g.dtype == dtype
        assert torch.equal(g, same)
        assert_close(g, w, dtype, shape[2], conditioning=moved)
    grads = [torch.randn(shape, dtype=dtype) for _ in range(2)]
    given = [*(g.double() for g in grads), *exact]
    wanted, moves = defined_backward(*given), rounding_moves(defined_backward, given, dtype)
    found = iter(torch.autograd.grad(got, [t for t in inputs if t is not None], grads))
    for t, w, moved in zip(inputs, wanted, moves, strict=True):
        if t is not None:
            g = next(found)
            assert g.dtype == dtype
            assert_close(g, w, dtype, 4 * max(1, shape[0] * shape[1]), grad=True, conditioning=moved)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("affine", [True, False])
def test_gradcheck(affine: bool) -> None:
    inputs = leaves(*make(2, 3, 4, affine))
    for backend in BACKENDS:
        for scale in (None, torch.tensor([0.0, 1.5]).double()):
            function = lambda *t, b=backend, s=scale: ops.add_layer_norm(*t, branch_scale=s, backend=b)  # noqa: E731
            assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.usefixtures("on_device")
def test_one_of_the_results_alone() -> None:
    for index in (0, 1):
        found = {}
        for backend in ("reference", "triton"):
            torch.manual_seed(0)
            inputs = leaves(*make(2, 3, 4))
            y = ops.add_layer_norm(*inputs, backend=backend)[index]
            found[backend] = torch.autograd.grad(y.square().sum(), inputs, allow_unused=True)
        for g, w in zip(found["triton"], found["reference"], strict=True):
            assert g is w is None or torch.allclose(torch.zeros_like(g) if w is None else w, g, atol=1e-12)


@pytest.mark.usefixtures("on_device")
def test_mixed_dtypes() -> None:
    """As under autocast: a float32 stream, a branch in 16 bits."""
    x, y, gamma, beta = make(2, 7, 16)
    for backend in BACKENDS:
        branch = y.half().requires_grad_()
        residual = x.clone().requires_grad_()
        total, normed = ops.add_layer_norm(residual, branch, gamma, beta, backend=backend)
        assert total.dtype == normed.dtype == torch.float32
        want = formula(x.double(), y.half().double(), gamma.double(), beta.double(), None)
        assert_close(total, want[0], torch.float32, 16)
        assert_close(normed, want[1], torch.float32, 16)
        dx, dy = torch.autograd.grad(normed.square().sum() + total.sum(), (residual, branch))
        assert (dx.dtype, dy.dtype) == (torch.float32, torch.float16)
        assert_close(dy, dx.double(), torch.float16, 16, grad=True)


@pytest.mark.usefixtures("on_device")
def test_inputs_are_left_alone_and_strides_are_free() -> None:
    x, y, gamma, beta = make(3, 8, 10)
    for a, b in ((x, y), (x.transpose(1, 2), y.transpose(1, 2)), (x[:, ::2], y[:, ::2]), (x, x)):
        weights = (gamma, beta) if a.shape[2] == 10 else (None, None)
        kept = a.clone(), b.clone()
        for backend in BACKENDS:
            got = ops.add_layer_norm(a, b, *weights, backend=backend)
            assert torch.equal(a, kept[0])
            assert torch.equal(b, kept[1])
            exact = (None if t is None else t.double() for t in (a, b, *weights))
            for g, w in zip(got, formula(*exact, None), strict=True):
                assert_close(g, w, torch.float32, 10)


@pytest.mark.usefixtures("on_device")
def test_tokens_that_hardly_vary_keep_their_digits() -> None:
    x, y = 1000 + 1e-2 * torch.randn(2, 9, 48), 1e-2 * torch.randn(2, 9, 48)
    total = (x + y).double()  # rounding the sum is no fault of the norm
    want = formula(total, torch.zeros_like(total), None, None, None)[1]
    mean_rounds = 1000 * 2**-24 / 1e-2  # relative to the deviation
    for backend in BACKENDS:
        normed = ops.add_layer_norm(x, y, None, None, backend=backend)[1]
        assert_close(normed, want, torch.float32, 48, conditioning=mean_rounds)


@pytest.mark.usefixtures("on_device")
def test_what_the_kernel_refuses() -> None:
    x, y, gamma, beta = make(1, 2, 2049)
    with pytest.raises(t2t_fast.BackendUnavailable, match="more channels than the kernel's 2048"):
        ops.add_layer_norm(x, y, gamma, beta, backend="triton")
    scale = torch.ones(1, requires_grad=True)
    with pytest.raises(t2t_fast.BackendUnavailable, match="no gradient for branch_scale"):
        ops.add_layer_norm(x[..., :4], y[..., :4], None, None, branch_scale=scale, backend="triton")


def test_auto_takes_the_kernel_where_memory_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(*shape: int, device: str = "cuda", x: torch.dtype = torch.bfloat16, y: torch.dtype | None = None) -> str:
        with FakeTensorMode():
            tensors = (torch.empty(shape, dtype=dtype, device=device) for dtype in (x, y or x))
            return str(why_not_auto_add_layer_norm(*tensors, Norm(None, None, EPS), None))

    large = (128, 197, 384)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert reason(*large, x=dtype) == "None"
    assert reason(*large, x=torch.float32, y=torch.bfloat16) == "None"
    assert reason(64, 128, 1024) == "None"  # 2**23 values
    assert "fewer than 8388608 values" in reason(65535, 1, 128)
    assert "float64 is left to the library" in reason(*large, x=torch.float64)
    assert "float64 is left to the library" in reason(*large, x=torch.float32, y=torch.float64)
    assert "interpreter" in reason(*large, device="cpu")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert "torch.compile fuses" in reason(*large)


def test_bad_input_is_named() -> None:
    x, y, gamma, beta = make(2, 3, 4)
    with pytest.raises(ValueError, match=r"x must have shape that of the result = \(2, 3, 4\), got \(2, 2, 4\)"):
        ops.add_layer_norm(x[:, :2], y, gamma, beta)
    with pytest.raises(ValueError, match=r"norm_bias must have shape \(C,\) = \(4,\), got \(3,\)"):
        ops.add_layer_norm(x, y, gamma, beta[:3])
