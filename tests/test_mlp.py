"""ops.mlp and the layer on top of it: values, gradients, the residual form, and what watches or replaces its parts."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_close, gradients, hand_written, leaves
from torch import Tensor, nn

import t2t_fast
from t2t_fast import ops
from t2t_fast.bench import samples
from t2t_fast.layers.block import Block
from t2t_fast.ops.block import reference
from t2t_fast.ops.block.arguments import MlpWeights
from t2t_fast.ops.common.branch import Branch

BACKENDS = ("reference", "aten")


def make(tokens: int, dim: int, hidden: int) -> list[Tensor]:
    return list(samples.make("mlp", samples.Sizes(tokens=tokens, channels=dim, hidden=hidden)).values())


def formula(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    a = x @ w1.T + b1
    return (a * 0.5 * (1 + torch.erf(a / math.sqrt(2)))) @ w2.T + b2


def defined(x: Tensor, *weights: Tensor | None) -> Tensor:
    return reference.mlp(x, MlpWeights(*weights), Branch())


def defined_backward(grad: Tensor, x: Tensor, *weights: Tensor | None) -> tuple[Tensor | None, ...]:
    dx, d_weights = reference.mlp_backward(grad, x, MlpWeights(*weights))
    return dx, *d_weights


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "dim", "hidden"), [(19, 32, 96), (1, 5, 3), (50, 64, 64)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_forward_and_gradients(backend: str, tokens: int, dim: int, hidden: int, dtype: torch.dtype) -> None:
    tensors = [t.to(dtype) for t in make(tokens, dim, hidden)]
    exact, residual = [t.double() for t in tensors], torch.randn(2, tokens, dim).to(dtype)
    want, scale = formula(*exact), torch.tensor([0.0, 1.25], dtype=dtype)
    branch = {"residual": residual, "branch_scale": scale}
    ended = residual.double() + scale.double()[:, None, None] * want
    kept = residual.clone()
    with torch.no_grad():  # where GELU and the sum may work in place
        assert_close(ops.mlp(*tensors, backend=backend), want, dtype, hidden)
        assert_close(ops.mlp(*tensors, residual=residual, backend=backend), residual.double() + want, dtype, hidden)
        assert_close(ops.mlp(*tensors, **branch, backend=backend), ended, dtype, hidden)
    assert_close(ops.mlp(*tensors, **branch, backend=backend), ended, dtype, hidden)
    assert torch.equal(residual, kept)
    grad = torch.randn_like(want).to(dtype)
    wanted = defined_backward(grad.double(), *exact)
    found = gradients(lambda *t: ops.mlp(*t, backend=backend), tensors, grad)
    for g, w in zip(found, wanted, strict=True):
        assert_close(g, w, dtype, 2 * tokens * hidden, grad=True)


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias: bool) -> None:
    tensors: list[Tensor | None] = list(make(4, 5, 6))
    if not bias:
        tensors[2] = tensors[4] = None
    inputs = leaves(*tensors)
    for backend in BACKENDS:
        assert torch.autograd.gradcheck(lambda *t, b=backend: ops.mlp(*t, backend=b), inputs)
    assert torch.autograd.gradcheck(hand_written(defined, defined_backward, 5), tuple(inputs))


def test_a_float32_residual_of_16_bit_tokens() -> None:
    tensors, residual = [t.half() for t in make(3, 8, 8)], torch.randn(2, 3, 8)
    for backend in BACKENDS:
        with torch.no_grad():
            got = ops.mlp(*tensors, residual=residual, backend=backend)
        assert got.dtype == torch.float32
        assert_close(got, residual.double() + formula(*(t.double() for t in tensors)), torch.float16, 8)


@torch.no_grad()
def test_hooks_and_replaced_layers_are_honoured() -> None:
    """Whoever watches, adapts or quantises a Linear or the activation of a block gets to see or do it."""
    block, x = Block(16, 2).eval(), torch.randn(2, 5, 16)
    want = block(x)
    assert "mlp" in t2t_fast.explain(block, x).backends()
    for name in ("mlp.fc1", "mlp.act", "mlp.fc2", "attn.qkv", "attn.proj"):
        seen: list[Tensor] = []
        copies: list[Tensor] = []

        def watch(module: nn.Module, args: object, y: Tensor, s: list[Tensor] = seen, c: list[Tensor] = copies) -> None:
            s.append(y)
            c.append(y.clone())

        handle = block.get_submodule(name).register_forward_hook(watch)
        assert torch.allclose(block(x), want, atol=1e-5)
        handle.remove()
        assert len(seen) == 1, name
        assert torch.equal(seen[0], copies[0]), f"what {name} returned was written over"

    class Adapted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    for name in ("mlp.fc1", "mlp.fc2", "attn.qkv", "attn.proj"):
        block = Block(16, 2).eval()
        before, old = block(x), block.get_submodule(name)
        new = Adapted(old.in_features, old.out_features, old.bias is not None)
        new.load_state_dict(old.state_dict())
        block.set_submodule(name, new)
        assert not torch.allclose(block(x), before, atol=1e-3), f"the adapter in {name} was passed over"


def test_another_drop_path_is_honoured() -> None:
    class Scale(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * x

    block, x = Block(16, 2, block_type="se_mlp").eval(), torch.randn(2, 5, 16)
    block.drop_path = Scale()
    assert torch.equal(block(x), x)


def test_bad_input_is_named() -> None:
    tensors = make(4, 5, 6)
    with pytest.raises(ValueError, match=r"fc2_bias must have shape \(rows of fc2_weight,\) = \(5,\), got \(4,\)"):
        ops.mlp(*tensors[:4], tensors[4][1:])
    with pytest.raises(ValueError, match=r"residual must have shape that of the result"):
        ops.mlp(*tensors, residual=torch.randn(2, 4, 4))
