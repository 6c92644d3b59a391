"""ops.se_gate against the formula in float64, with hand-written gradients."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, gradients, hand_written, leaves, rounding_moves
from torch import Tensor

from t2t_fast import ops
from t2t_fast.bench import samples
from t2t_fast.ops.common.branch import Branch
from t2t_fast.ops.se import reference
from t2t_fast.ops.se.arguments import GateWeights

BACKENDS = ("reference", "aten", "native")


def defined(x: Tensor, *gate: Tensor) -> Tensor:
    return reference.se_gate(x, GateWeights(*gate), Branch())


def defined_backward(grad: Tensor, x: Tensor, *gate: Tensor) -> tuple[Tensor, ...]:
    dx, d_gate = reference.se_gate_backward(grad, x, GateWeights(*gate))
    return dx, *d_gate


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "dim", "reduced"), [(197, 48, 3), (1, 16, 1), (33, 384, 24)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_forward_and_gradients(backend: str, tokens: int, dim: int, reduced: int, dtype: torch.dtype) -> None:
    sizes = samples.Sizes(batch=3, tokens=tokens, channels=dim, reduced=reduced)
    x, w_reduce, w_expand = samples.make("se_gate", sizes, dtype).values()
    x += 1
    exact = [t.double() for t in (x, w_reduce, w_expand)]
    gate = torch.sigmoid(torch.relu(exact[0].mean(1) @ exact[1].T) @ exact[2].T)
    want = exact[0] * gate[:, None]
    got = ops.se_gate(x, w_reduce, w_expand, backend=backend)
    assert got.dtype == dtype
    assert_close(got, want, dtype, tokens + dim)
    grad = torch.randn_like(want).to(dtype)
    wanted = defined_backward(grad.double(), *exact)
    found = gradients(lambda *t: ops.se_gate(*t, backend=backend), (x, w_reduce, w_expand), grad)
    moves = rounding_moves(lambda *t: defined_backward(grad.double(), *t), exact, dtype)
    for g, w, conditioning in zip(found, wanted, moves, strict=True):
        assert_close(g, w, dtype, tokens + dim, grad=True, conditioning=conditioning)


def test_gradcheck() -> None:
    inputs = leaves(*samples.make("se_gate", samples.Sizes(tokens=5, channels=6)).values())
    for backend in BACKENDS:
        assert torch.autograd.gradcheck(lambda *t, b=backend: ops.se_gate(*t, backend=b), inputs)
    assert torch.autograd.gradcheck(hand_written(defined, defined_backward, 3), tuple(inputs))


def test_bad_input_is_named() -> None:
    x = torch.randn(2, 5, 6)
    with pytest.raises(ValueError, match=r"w_expand must have shape \(C, R\) = \(6, 3\), got \(6, 2\)"):
        ops.se_gate(x, torch.randn(3, 6), torch.randn(6, 2))
