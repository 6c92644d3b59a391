"""Blocks: what their ops are joined into, and that whoever watches or replaces a part gets to see or do it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import t2t_fast
from t2t_fast.layers import block_weights
from t2t_fast.layers.block import BLOCK_TYPES, Block
from t2t_fast.ops.block import op

KINDS = [kind for kind in BLOCK_TYPES if kind != "dense"]


def literal(block: Block, x: Tensor) -> Tensor:
    """By calling every module of the block."""
    x = x + block.drop_path(block.attn(block.norm1(x)))
    return x + block.drop_path(block.mlp(block.norm2(x)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", [False, True])
def test_joined_ops_are_the_modules_in_a_row(kind: str, train: bool) -> None:
    block = Block(32, 2, 3.0, drop_path=0.4, block_type=kind).double().train(train)
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(3, 7, 32).double().requires_grad_()
    learned = [x, *block.parameters()]
    found = {}
    for name, function in (("joined", block), ("literal", lambda x: literal(block, x))):
        torch.manual_seed(1)  # of the stochastic depth
        y = function(x)
        found[name] = [y, *torch.autograd.grad(y.sin().sum(), learned)]
    for got, want in zip(found["joined"], found["literal"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_a_standard_block_joins_its_norms() -> None:
    ran = t2t_fast.explain(Block(32, 2), torch.randn(2, 5, 32)).backends()
    assert set(ran) == {"attention", "linear", "add_layer_norm", "mlp"}


@pytest.fixture
def kernels_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` takes the kernel between the blocks' branches, in the interpreter too."""
    willing = tuple(
        dataclasses.replace(i, why_not_auto=lambda *args: None) if i.backend == "triton" else i
        for i in op._ADD_LAYER_NORM.implementations
    )
    monkeypatch.setattr(block_weights, "why_not_auto_add_layer_norm", lambda *args: None)
    monkeypatch.setattr(op, "_ADD_LAYER_NORM", dataclasses.replace(op._ADD_LAYER_NORM, implementations=willing))


@pytest.mark.usefixtures("kernels_in_blocks", "poisoned", "on_device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_a_block_of_kernels(dtype: torch.dtype) -> None:
    block = Block(32, 2, 3.0, drop_path=0.4).to(torch.empty(0).device, dtype).train()
    x = torch.randn(3, 7, 32, dtype=dtype).requires_grad_()
    ran = t2t_fast.explain(block, x).backends()
    assert ran["add_layer_norm"] == {"triton"}
    learned = [x, *block.parameters()]
    found = {}
    for name, function in (("kernels", block), ("literal", lambda x: literal(block, x))):
        with t2t_fast.use_backend("reference" if name == "literal" else "auto"):
            torch.manual_seed(1)
            y = function(x)
            found[name] = [y, *torch.autograd.grad(y.float().square().sum(), learned)]
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-2}[dtype]
    for got, want in zip(found["kernels"], found["literal"], strict=True):
        assert (got - want).double().norm() <= tolerance * want.double().norm()


@pytest.mark.usefixtures("kernels_in_blocks", "on_device")
def test_a_frozen_block_of_kernels() -> None:
    small = {"img_size": 32, "tokens_type": "convolution", "embed_dim": 64, "num_heads": 2, "depth": 2}
    model = t2t_fast.create_model("t2t_vit_7", **small, num_classes=3)
    model = model.double().to(torch.empty(0).device).eval()
    images = torch.randn(2, 3, 32, 32).double()
    frozen = t2t_fast.freeze(model)
    ran = t2t_fast.explain(frozen, images).backends()
    assert ran["add_layer_norm"] == {"triton"}
    with torch.no_grad(), t2t_fast.use_backend("reference"):
        torch.testing.assert_close(frozen(images), model(images))


@pytest.mark.slow
@pytest.mark.usefixtures("kernels_in_blocks")
def test_compiled_blocks_of_kernels() -> None:
    block = Block(32, 2, 3.0)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for batch in (2, 3):
        x = torch.randn(batch, 7, 32)
        want = torch.autograd.grad(block(x).square().sum(), list(block.parameters()))
        found = torch.autograd.grad(compiled(x).square().sum(), list(block.parameters()))
        for g, w in zip(found, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_see_what_the_modules_see(kind: str) -> None:
    """Inputs and outputs of each part, as if the block called them one by one."""
    block, x = Block(32, 2, 3.0, block_type=kind).eval(), torch.randn(2, 5, 32)
    for name in ("norm1", "attn", "norm2", "mlp"):
        part = block.get_submodule(name)
        seen: list[tuple[Tensor, Tensor]] = []
        handle = part.register_forward_hook(lambda m, args, y, s=seen: s.append((args[0].clone(), y.clone())))
        got = block(x)
        want = literal(block, x)
        handle.remove()
        assert len(seen) == 2, name
        for a, b in zip(*seen, strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, n=name: f"{n}: {text}")
        torch.testing.assert_close(got, want)
        handle = part.register_forward_pre_hook(lambda m, args, s=seen: s.append((args[0].clone(),)))
        block(x)
        handle.remove()
        torch.testing.assert_close(seen[2][0], seen[1][0])


def test_a_replaced_attention_is_called() -> None:
    block, x = Block(32, 2).eval(), torch.randn(2, 5, 32)
    block.attn = nn.Linear(32, 32)
    torch.testing.assert_close(block(x), literal(block, x))


def test_a_watched_stochastic_depth_is_called() -> None:
    block, x, seen = Block(32, 2, drop_path=0.5).eval(), torch.randn(2, 5, 32), list[Tensor]()
    block.drop_path.register_forward_hook(lambda m, args, y: seen.append(y))
    block(x)
    assert len(seen) == 2


def test_replaced_norms_are_called() -> None:
    class Doubled(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x = torch.randn(2, 5, 32)
    for name in ("norm1", "norm2"):
        block = Block(32, 2).eval()
        before = block(x)
        block.set_submodule(name, Doubled(32))
        assert not torch.allclose(block(x), before, atol=1e-3)
        torch.testing.assert_close(block(x), literal(block, x))
