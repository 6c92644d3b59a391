"""A standard block's choices are made once: every later change of the block is seen, and nothing else differs."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import t2t_fast
from t2t_fast.bench import overhead
from t2t_fast.layers import known_block
from t2t_fast.layers.block import Block

TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def literal(block: Any, x: Tensor) -> Tensor:
    """The formula, by calling every module."""
    x = x + block.drop_path(block.attn(block.norm1(x)))
    return x + block.drop_path(block.mlp(block.norm2(x)))


def make_block(dtype: torch.dtype = torch.float64, **options: Any) -> Block:
    block = Block(32, 2, 3.0, **options).to(dtype)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block.eval()


def is_known(block: Block, x: Tensor) -> bool:
    """Whether a call takes the remembered way."""
    return known_block.known_block(block, x, None) is not None


def assert_near(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error <= TOLERANCES[got.dtype]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 1, 32), (3, 7, 32), (2, 70, 32)])
def test_inference_is_the_modules_in_a_row(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    block, x = make_block(dtype), torch.randn(shape).to(dtype)
    with torch.no_grad():
        before, kept = x.clone(), block(x)
        assert is_known(block, x)
        assert torch.equal(block(x), kept) and torch.equal(x, before)  # and the tokens are left as they were
        assert_near(kept, literal(block.double(), x.double()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_training_is_the_modules_in_a_row(dtype: torch.dtype, drop_path: float) -> None:
    block = make_block(dtype, drop_path=drop_path).train()
    x = torch.randn(4, 7, 32, dtype=dtype).requires_grad_()
    assert is_known(block, x)
    found = {}
    for name, function in (("known", block), ("literal", lambda x: literal(block, x))):
        torch.manual_seed(3)
        y = function(x)
        found[name] = [y, *torch.autograd.grad(y.sin().sum(), [x, *block.parameters()])]
    for got, want in zip(found["known"], found["literal"], strict=True):
        assert (got - want).norm() <= 10 * TOLERANCES[dtype] * want.norm()


def test_training_with_second_derivatives() -> None:
    block = make_block().train()
    x = torch.randn(2, 3, 32, dtype=torch.float64).requires_grad_()
    assert is_known(block, x)
    assert torch.autograd.gradgradcheck(lambda x: block(x)[:, :, ::8], (x,), atol=1e-4)


class Double(nn.Module):
    """Stands in for a part: twice what the part computes."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.part(x)


def replace(name: str) -> Callable[[Block], object]:
    def change(block: Block) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(parent), leaf, Double(block.get_submodule(name)))

    return change


def patch(block: Any) -> None:
    forward = block.mlp.fc2.forward
    block.mlp.fc2.forward = lambda x: forward(x) + 1


def write(block: Any) -> None:
    with torch.no_grad():
        block.attn.qkv.weight.mul_(2)


class Shifted(nn.Linear):
    """A Linear of another class."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


PARTS = ("norm1", "attn.qkv", "attn.attn_drop", "attn.proj", "attn.proj_drop", "norm2", "mlp.fc1", "mlp.act", "mlp.fc2")
CHANGES: dict[str, Callable[[Any], object]] = {
    **{f"{name} replaced": replace(name) for name in (*PARTS, "drop_path", "mlp", "mlp.norm", "attn.se_layer")},
    "forward patched": patch,
    "weight written": write,
    "weight exchanged": lambda b: setattr(b.attn.proj, "weight", nn.Parameter(b.attn.proj.weight * 2)),
    "weight's data exchanged": lambda b: setattr(b.mlp.fc1.weight, "data", b.mlp.fc1.weight.data * 2),
    "bias gone": lambda b: setattr(b.mlp.fc1, "bias", None),
    "weights loaded": lambda b: b.load_state_dict({k: 2 * v for k, v in b.state_dict().items()}),
    "parametrised": lambda b: parametrizations.spectral_norm(b.attn.proj),
    "class": lambda b: setattr(b.mlp.fc2, "__class__", Shifted),
    "eps": lambda b: setattr(b.norm1, "eps", 0.5),
    "scale": lambda b: setattr(b.attn, "scale", 2.0),
    "heads": lambda b: (setattr(b.attn, "num_heads", 4), setattr(b.attn, "head_dim", 8)),
    "tanh": lambda b: setattr(b.mlp, "act", nn.GELU("tanh")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change: str) -> None:
    block, x = make_block(), torch.randn(2, 5, 32, dtype=torch.float64)
    with torch.no_grad():
        before = block(x)
        assert is_known(block, x)
        CHANGES[change](block)
        after = block(x)
        assert_near(after, literal(block, x))
    assert not torch.allclose(after, before)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_added_later_are_called(part: str, kind: str) -> None:
    block, x = make_block(), torch.randn(2, 5, 32, dtype=torch.float64)
    with torch.no_grad():
        want = block(x)
        seen: list[object] = []
        handle = getattr(block.get_submodule(part), kind)(lambda *args: seen.append(args))
        assert_near(block(x), want)
        assert seen
        handle.remove()
        assert is_known(block, x) and torch.equal(block(x), want)


def test_global_hooks_are_called() -> None:
    block, x = make_block(), torch.randn(2, 5, 32, dtype=torch.float64)
    seen = []
    with torch.no_grad():
        block(x)
        with torch.nn.modules.module.register_module_forward_hook(lambda module, *args: seen.append(type(module))):
            block(x)
    assert nn.Linear in seen and nn.LayerNorm in seen


def test_dropout_switched_on_later_drops() -> None:
    block, x = make_block(drop=0.5), torch.randn(2, 50, 32, dtype=torch.float64)
    with torch.no_grad():
        block(x)
        assert is_known(block, x)
        block.mlp.drop2.train()
        torch.manual_seed(0)
        got = block(x)
        torch.manual_seed(0)
        assert_near(got, literal(block, x))
        assert not torch.allclose(block(x), got)


def test_moved_and_cast() -> None:
    block, x = make_block(torch.float32), torch.randn(2, 5, 32)
    with torch.no_grad():
        block(x)
        for dtype in (torch.float64, torch.bfloat16, torch.float32):
            assert_near(block.to(dtype)(x.to(dtype)), literal(block, x.to(dtype)))
        block(x)
        meta = block.to("meta")(x.to("meta"))
    assert meta.device.type == "meta" and meta.shape == x.shape


def test_other_tokens_are_refused_as_before() -> None:
    block, x = make_block(torch.float32), torch.randn(2, 5, 32)
    with torch.no_grad():
        block(x)
        for other, words in ((x.double(), "float64"), (x[..., :31], "31"), (x[0], "dimensions")):
            with pytest.raises((TypeError, ValueError, RuntimeError), match=words):
                block(other)
        assert block(x[:0]).shape == (0, 5, 32)


def test_backends_and_explain_are_heeded() -> None:
    block, x = make_block(torch.float32), torch.randn(2, 5, 32)
    with torch.no_grad():
        block(x)
        ran = t2t_fast.explain(block, x).backends()
        assert set(ran) == {"linear", "attention", "add_layer_norm", "mlp"}
        with t2t_fast.use_backend("reference"):
            assert not is_known(block, x)
        with pytest.raises(t2t_fast.BackendUnavailable), t2t_fast.use_backend("native"):
            block(x)


def test_copies_remember_nothing() -> None:
    block, x = make_block(), torch.randn(2, 5, 32, dtype=torch.float64)
    with torch.no_grad():
        want = block(x)
        buffer = io.BytesIO()
        torch.save(block, buffer)
        buffer.seek(0)
        for other in (copy.deepcopy(block), torch.load(buffer, weights_only=False)):
            assert other._known is None
            write(other)
            assert not torch.allclose(other(x), want)
        assert torch.equal(block(x), want)


def test_functional_calls_use_their_weights_and_leave_none_behind() -> None:
    block, x = make_block(), torch.randn(2, 5, 32, dtype=torch.float64)
    factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    weights = {name: weight.detach() * factor for name, weight in block.named_parameters()}
    want = block(x)
    got = torch.func.functional_call(block, weights, (x,))
    got.sum().backward()
    assert factor.grad is not None and not torch.allclose(got, want)
    assert torch.equal(block(x), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_weights_may_be_loaded_later(dtype: torch.dtype) -> None:
    sizes: dict[str, Any] = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 3}
    frozen = t2t_fast.freeze(t2t_fast.T2TViT(tokens_type="convolution", **sizes).eval(), dtype)
    images = torch.randn(2, 3, 32, 32)
    before = frozen(images)
    frozen.load_state_dict({name: 1.5 * weight for name, weight in frozen.state_dict().items()})
    after = frozen(images)
    assert not torch.allclose(after, before)
    assert torch.equal(copy.deepcopy(frozen)(images), after)  # a copy packs anew


def test_calls_of_python() -> None:
    torch.manual_seed(0)
    calls = {}
    for (mode, name), block in overhead.make_blocks(6, torch.float32).items():
        calls[mode, name] = overhead.count_calls(mode, block, torch.randn(1, 5, 48))
    assert calls["inference", "frozen"] <= calls["inference", "timm"]
    assert calls["inference", "auto"] <= calls["inference", "timm"]
    assert calls["training", "auto"] <= 1.5 * calls["training", "timm"]


def test_the_benchmark_of_python_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads, path = torch.get_num_threads(), tmp_path / "overhead.json"
    assert overhead.main(["--rounds", "2", "--heads", "2", "--precision", "bfloat16", "--output", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["mode"], row["block"]) for row in rows] == [
        ("inference", "timm"),
        ("inference", "auto"),
        ("inference", "frozen"),
        ("training", "timm"),
        ("training", "auto"),
    ]
    assert all(row["microseconds"] > 0 and row["calls"] > 10 for row in rows)
    assert rows[0]["times_timm"] == rows[3]["times_timm"] == 1
    assert "frozen" in capsys.readouterr().out and torch.get_num_threads() == threads
