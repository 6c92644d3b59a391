"""ops.linear against a matmul in float64: oneDNN's operator, its gradients, and when it is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, gradients, leaves
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import t2t_fast
from t2t_fast import ops
from t2t_fast.bench import samples
from t2t_fast.layers.packed_linear import PackedLinear

BACKENDS = ("reference", "aten")
SHAPES = [(2, 19, 32, 96), (1, 1, 5, 3), (3, 50, 64, 1), (0, 4, 6, 7)]  # images, tokens, channels in and out


def make(images: int, tokens: int, dim: int, out: int) -> list[Tensor]:
    return list(samples.make("linear", samples.Sizes(batch=images, tokens=tokens, channels=dim, out=out)).values())


def erf_gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_forward_and_gradients(backend: str, shape: tuple[int, int, int, int], dtype: torch.dtype, gelu: bool) -> None:
    tensors = [t.to(dtype) for t in make(*shape)]

    def formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = torch.einsum("bnc,oc->bno", x, weight) + bias
        return erf_gelu(y) if gelu else y

    exact = [t.double() for t in tensors]
    want = formula(*exact)
    with torch.no_grad():  # where GELU may be part of the matmul, or work in place
        assert_close(ops.linear(*tensors, gelu=gelu, backend=backend), want, dtype, shape[2])
    got = ops.linear(*tensors, gelu=gelu, backend=backend)
    assert got.dtype == dtype
    assert_close(got, want, dtype, shape[2])
    grad = torch.randn_like(want).to(dtype)
    wanted = gradients(formula, exact, grad.double())
    found = gradients(lambda *t: ops.linear(*t, gelu=gelu, backend=backend), tensors, grad)
    for g, w in zip(found, wanted, strict=True):
        assert_close(g, w, dtype, 4 * max(1, shape[0] * shape[1]) + shape[3], grad=True)


def test_gradcheck() -> None:
    inputs = leaves(*make(2, 3, 4, 5))
    for backend in BACKENDS:
        assert torch.autograd.gradcheck(lambda *t, b=backend: ops.linear(*t, gelu=True, backend=b), inputs)


@pytest.mark.parametrize("gelu", [False, True])
def test_operator(gelu: bool) -> None:
    """The operator by itself: schema, shapes, gradients (those of GELU included) and operations."""
    x, weight, bias = (t.requires_grad_() for t in make(2, 7, 6, 5))
    torch.library.opcheck(torch.ops.t2t_fast.linear.default, (x, weight, bias, gelu))
    torch.library.opcheck(torch.ops.t2t_fast.linear.default, (x, weight, None, gelu))
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    y = F.linear(*exact)
    want = torch.autograd.grad((erf_gelu(y) if gelu else y).square().sum(), exact)
    got = torch.autograd.grad(torch.ops.t2t_fast.linear(x, weight, bias, gelu).square().sum(), (x, weight, bias))
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, torch.float32, 28, grad=True)
    with FlopCounterMode(display=False) as counter:
        torch.ops.t2t_fast.linear(x, weight, bias, gelu)
    assert counter.get_total_flops() == 2 * 2 * 7 * 6 * 5


def test_second_derivative() -> None:
    x, weight, bias = (t.requires_grad_() for t in make(2, 3, 4, 5))
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]

    def twice(tensors: list[Tensor], function: Callable[..., Tensor]) -> Tensor:
        (dx,) = torch.autograd.grad(function(*tensors).pow(3).sum(), tensors[0], create_graph=True)
        return torch.autograd.grad(dx.square().sum(), tensors[1])[0]

    got = twice([x, weight, bias], lambda *t: ops.linear(*t, gelu=True, backend="aten"))
    assert_close(got, twice(exact, lambda *t: erf_gelu(F.linear(*t))), torch.float32, 30, grad=True)


def test_strides_and_views() -> None:
    x, weight, bias = make(4, 9, 10, 12)
    for view, transposed in ((x[::2, 1:, ::2], weight[:, ::2]), (x.transpose(0, 1), weight.flip(0))):
        want = F.linear(view.double(), transposed.double(), bias.double())
        assert_close(ops.linear(view, transposed, bias), want, torch.float32, 10)


def test_which_library_multiplies() -> None:
    x, weight, bias = make(2, 300, 48, 64)

    def told(*args: Tensor) -> str:
        (decision,) = t2t_fast.explain(lambda: ops.linear(*args)).decisions
        return str(decision.detail)

    if not torch.backends.mkldnn.is_available():
        assert "x86" in told(x, weight, bias)
        return
    with torch.no_grad():
        assert told(x, weight, bias) == "oneDNN"
        assert "is small" in told(x[:, :100], weight, bias)
    assert "is small" in told(x, weight, bias)  # with gradients a custom operator has to pay
    assert "is for float32" in told(x.double(), weight.double(), bias.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "outside autocast" in told(x, weight, bias)
        assert ops.linear(x, weight, bias).dtype == torch.bfloat16
    assert "plain tensors with values" in told(x[:0], weight, bias)


def test_bad_input_is_named() -> None:
    x, weight, bias = make(2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"weight must have shape \(rows, 3\) = \(5, 3\), got \(5, 4\)"):
        ops.linear(x[..., :3], weight, bias)
    with pytest.raises(ValueError, match=r"bias must have shape \(rows of weight,\) = \(5,\), got \(4,\)"):
        ops.linear(x, weight, bias[:4])


class LibraryCounter(TorchDispatchMode):
    """Counts multiply-accumulates of the library's matmuls alone, as ptflops does."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            left, right = args[-2:]
            self.macs += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gradients", [False, True])
def test_counters_see_library_products(gradients: bool) -> None:
    x, weight, bias = make(2, 7, 6, 5)
    packed = PackedLinear(nn.Linear(6, 5))
    with torch.set_grad_enabled(gradients), LibraryCounter() as counter:
        ops.linear(x, weight.requires_grad_(), bias)
        packed(x)
    assert counter.macs == 2 * (2 * 7 * 6 * 5)
