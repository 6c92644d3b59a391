"""ops.se_mlp against the formula in float64, with hand-written gradients."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_close, gradients, hand_written, leaves, rounding_moves
from torch import Tensor

from t2t_fast import ops
from t2t_fast.bench import samples
from t2t_fast.ops.block.arguments import MlpWeights
from t2t_fast.ops.common.branch import Branch
from t2t_fast.ops.se import reference
from t2t_fast.ops.se.arguments import GateWeights

BACKENDS = ("reference", "aten", "native")


def make(tokens: int, dim: int, hidden: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    sizes = samples.Sizes(tokens=tokens, channels=dim, hidden=hidden, reduced=max(1, dim // 16))
    return list(samples.make("se_mlp", sizes, dtype).values())


def formula(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, reduce: Tensor, expand: Tensor) -> Tensor:
    a = x @ w1.T + b1
    y = (a * 0.5 * (1 + torch.erf(a / math.sqrt(2)))) @ w2.T + b2
    return y * torch.sigmoid(torch.relu(y.mean(1) @ reduce.T) @ expand.T)[:, None]


def defined(x: Tensor, *weights: Tensor | None) -> Tensor:
    *mlp, w_reduce, w_expand = weights
    return reference.se_mlp(x, MlpWeights(*mlp), GateWeights(w_reduce, w_expand), Branch())


def defined_backward(grad: Tensor, x: Tensor, *weights: Tensor | None) -> tuple[Tensor | None, ...]:
    *mlp, w_reduce, w_expand = weights
    dx, d_mlp, d_gate = reference.se_mlp_backward(grad, x, MlpWeights(*mlp), GateWeights(w_reduce, w_expand))
    return dx, *d_mlp, *d_gate


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "dim", "hidden"), [(19, 32, 96), (1, 5, 3), (50, 64, 64)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_forward_and_gradients(backend: str, tokens: int, dim: int, hidden: int, dtype: torch.dtype) -> None:
    tensors = make(tokens, dim, hidden, dtype)
    exact = [t.double() for t in tensors]
    want = formula(*exact)
    got = ops.se_mlp(*tensors, backend=backend)
    assert got.dtype == dtype
    assert_close(got, want, dtype, hidden)
    grad = torch.randn_like(want).to(dtype)
    wanted = defined_backward(grad.double(), *exact)
    found = gradients(lambda *t: ops.se_mlp(*t, backend=backend), tensors, grad)
    moves = rounding_moves(lambda *t: defined_backward(grad.double(), *t), exact, dtype)
    for g, w, conditioning in zip(found, wanted, moves, strict=True):
        assert_close(g, w, dtype, 2 * tokens * hidden, grad=True, conditioning=conditioning)


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias: bool) -> None:
    tensors: list[Tensor | None] = list(make(4, 5, 6))
    if not bias:
        tensors[2] = tensors[4] = None
    inputs = leaves(*tensors)
    for backend in BACKENDS:
        assert torch.autograd.gradcheck(lambda *t, b=backend: ops.se_mlp(*t, backend=b), inputs)
    assert torch.autograd.gradcheck(hand_written(defined, defined_backward, 7), tuple(inputs))


def test_bad_input_is_named() -> None:
    tensors = make(4, 5, 6)
    tensors[2] = tensors[2][1:]
    with pytest.raises(ValueError, match=r"fc1_bias must have shape \(rows of fc1_weight,\) = \(6,\), got \(5,\)"):
        ops.se_mlp(*tensors)
