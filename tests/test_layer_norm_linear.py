"""ops.layer_norm_linear against a float64 formula: every backend, with and without affine parts, bias and GELU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import assert_close, gradients, hand_written, leaves, rounding_moves
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from t2t_fast import ops
from t2t_fast.bench import samples
from t2t_fast.ops.block import reference
from t2t_fast.ops.common.norm import Norm

BACKENDS = ("reference", "aten")
EPS = 1e-5


def make(images: int, tokens: int, dim: int, out: int, affine: bool = True, bias: bool = True) -> list[Tensor | None]:
    without = [*(() if bias else ("bias",)), *(() if affine else ("norm_weight", "norm_bias"))]
    sizes = samples.Sizes(batch=images, tokens=tokens, channels=dim, out=out)
    x, *weights = samples.make("layer_norm_linear", sizes, without=without).values()
    return [x + torch.randn(images, tokens, 1), *weights]


def formula(gelu: bool) -> Callable[..., Tensor]:
    def function(x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        z = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
        n = (z if gamma is None else z * gamma) + (0 if beta is None else beta)
        y = torch.einsum("bnc,oc->bno", n, weight) + (0 if bias is None else bias)
        return y * 0.5 * (1 + torch.erf(y / 2**0.5)) if gelu else y

    return function


def defined(
    x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, gelu: bool
) -> Tensor:
    return reference.layer_norm_linear(x, weight, bias, Norm(gamma, beta, EPS), gelu)


def defined_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    gelu: bool,
) -> tuple[Tensor | None, ...]:
    return reference.layer_norm_linear_backward(grad, x, weight, bias, Norm(gamma, beta, EPS), gelu)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "affine", "bias", "gelu"),
    [
        ((2, 19, 32, 96), True, True, True),
        ((2, 33, 24, 40), True, False, False),
        ((1, 1, 5, 3), True, True, False),
        ((3, 21, 70, 17), False, True, True),
        ((0, 4, 6, 7), True, True, True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_forward_and_gradients(
    backend: str, shape: tuple[int, int, int, int], affine: bool, bias: bool, gelu: bool, dtype: torch.dtype
) -> None:
    tensors = [None if t is None else t.to(dtype) for t in make(*shape, affine, bias)]
    exact = [None if t is None else t.double() for t in tensors]
    want = formula(gelu)(*exact)
    (moves,) = rounding_moves(lambda *t: [formula(gelu)(*t)], exact, dtype) if shape[0] else [0.0]
    with torch.no_grad():
        got = ops.layer_norm_linear(*tensors, gelu=gelu, backend=backend)
    assert_close(got, want, dtype, shape[2], conditioning=moves)
    got = ops.layer_norm_linear(*tensors, gelu=gelu, backend=backend)
    assert got.dtype == dtype
    assert_close(got, want, dtype, shape[2], conditioning=moves)
    grad = torch.randn_like(want).to(dtype)
    wanted = defined_backward(grad.double(), *exact, gelu)
    moves = rounding_moves(lambda *t: defined_backward(*t, gelu), [grad.double(), *exact], dtype)
    found = gradients(lambda *t: ops.layer_norm_linear(*t, gelu=gelu, backend=backend), tensors, grad)
    for g, w, moved in zip(found, wanted, moves, strict=True):
        if w is None:
            assert g is None
        else:
            reduction = 4 * max(1, shape[0] * shape[1]) + shape[3]
            assert_close(g, w, dtype, reduction, grad=True, conditioning=moved)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_gradcheck(gelu: bool, affine: bool) -> None:
    inputs = leaves(*make(2, 3, 4, 5, affine, bias=affine))
    for backend in BACKENDS:
        function = lambda *t, b=backend: ops.layer_norm_linear(*t, gelu=gelu, backend=b)  # noqa: E731
        assert torch.autograd.gradcheck(function, inputs, nondet_tol=1e-12)
    by_hand = hand_written(defined, defined_backward, 5)
    assert torch.autograd.gradcheck(lambda *t: by_hand(*t, gelu), inputs)


def test_strides() -> None:
    x, *rest = make(4, 9, 20, 12)
    for view in (x[::2, 1:], x.transpose(0, 1), x[:, :, ::2]):
        weights = [None if t is None else t[..., : view.shape[2]] if t.shape[-1] == 20 else t for t in rest]
        want = formula(True)(*(t.double() for t in (view, *weights)))
        for backend in BACKENDS:
            got = ops.layer_norm_linear(view, *weights, gelu=True, backend=backend)
            assert_close(got, want, torch.float32, 20)


def test_gelu_is_the_exact_one_at_large_arguments() -> None:
    x = torch.tensor([[[-9.0, -6.0, -3.0, 3.0, 6.0, 9.0]]]).repeat(1, 1, 3)
    weight = torch.eye(18)
    want = torch.nn.functional.gelu(x.double())
    for backend in BACKENDS:
        got = ops.linear(x, weight, None, gelu=True, backend=backend)
        assert (got.double() - want).abs().max() < 2e-6


def test_autocast() -> None:
    tensors = make(2, 9, 16, 24)
    want = formula(True)(*(t.double() for t in tensors))
    for backend in BACKENDS:
        with torch.autocast(tensors[0].device.type, dtype=torch.float16):
            got = ops.layer_norm_linear(*tensors, gelu=True, backend=backend)
        assert got.dtype == torch.float16
        assert_close(got, want, torch.float16, 16)


def test_flops() -> None:
    def count(backend: str) -> int:
        inputs = leaves(*make(2, 7, 6, 5))
        with FlopCounterMode(display=False) as counter:
            ops.layer_norm_linear(*inputs, backend=backend).sum().backward()
        return counter.get_total_flops()

    assert count("aten") == count("reference") == 3 * 2 * 2 * 7 * 6 * 5


def test_bad_input_is_named() -> None:
    x, weight, bias, gamma, beta = make(2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"norm_weight must have shape \(C,\) = \(4,\), got \(3,\)"):
        ops.layer_norm_linear(x, weight, bias, gamma[:3], beta)
    with pytest.raises(ValueError, match=r"weight must have shape \(rows, 4\) = \(5, 4\), got \(5, 3\)"):
        ops.layer_norm_linear(x, weight[:, :3], bias, gamma, beta)
