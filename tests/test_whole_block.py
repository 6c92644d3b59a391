"""A standard block in one function: the modules' results, every change of a block seen, and nothing kept."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import t2t_fast
from t2t_fast.bench import memory, overhead
from t2t_fast.layers import Attention, block_weights
from t2t_fast.layers import block as block_module
from t2t_fast.layers.block import Block
from t2t_fast.layers.mlp import Mlp

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


def is_whole(block: Block, x: Tensor) -> bool:
    """Whether a call runs ``whole_block``."""
    return block_weights.weights_for(block, x) is not None


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
        assert is_whole(block, x)
        assert torch.equal(block(x), kept) and torch.equal(x, before)  # and the tokens are left as they were
        assert_near(kept, literal(block.double(), x.double()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_training_is_the_modules_in_a_row(dtype: torch.dtype, drop_path: float) -> None:
    block = make_block(dtype, drop_path=drop_path).train()
    x = torch.randn(4, 7, 32, dtype=dtype).requires_grad_()
    assert is_whole(block, x)
    found = {}
    for name, function in (("whole", block), ("literal", lambda x: literal(block, x))):
        torch.manual_seed(3)
        y = function(x)
        found[name] = [y, *torch.autograd.grad(y.sin().sum(), [x, *block.parameters()])]
    for got, want in zip(found["whole"], found["literal"], strict=True):
        assert (got - want).norm() <= 10 * TOLERANCES[dtype] * want.norm()


def test_training_with_second_derivatives() -> None:
    block = make_block().train()
    x = torch.randn(2, 3, 32, dtype=torch.float64).requires_grad_()
    assert is_whole(block, x)
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
    "approximate": lambda b: setattr(b.mlp.act, "approximate", "tanh"),
    "weight hidden": lambda b: vars(b.mlp.fc1).update(weight=2 * b.mlp.fc1.weight),
    "weights' dictionary": lambda b: setattr(
        b.mlp.fc1, "_parameters", {k: 2 * v for k, v in b.mlp.fc1._parameters.items()}
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change: str) -> None:
    block, x = make_block(), torch.randn(2, 5, 32, dtype=torch.float64)
    with torch.no_grad():
        before = block(x)
        assert is_whole(block, x)
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
        assert is_whole(block, x) and torch.equal(block(x), want)


def test_hooks_in_a_new_dictionary_are_called() -> None:
    block, x = make_block(), torch.randn(2, 5, 32, dtype=torch.float64)
    seen: list[object] = []
    with torch.no_grad():
        block(x)
        for module in block.modules():
            module._forward_hooks = OrderedDict()  # a usual way to remove all hooks
        block.attn.proj.register_forward_hook(lambda *args: seen.append(args))
        block(x)
    assert seen


@pytest.mark.parametrize("cls", [Attention, Mlp])
def test_patched_classes_are_called(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = make_block(), torch.randn(2, 5, 32, dtype=torch.float64)
    forward, seen = cls.forward, []
    with torch.no_grad():
        want = block(x)
        monkeypatch.setattr(cls, "forward", lambda *args, **options: seen.append(1) or forward(*args, **options))
        assert_near(block(x), want)
    assert seen


def test_compiled_parts_are_called() -> None:
    block, x = make_block(), torch.randn(2, 5, 32, dtype=torch.float64)
    graphs = []
    with torch.no_grad():
        want = block(x)
        block.attn.compile(backend=lambda graph, inputs: graphs.append(graph) or graph)
        assert_near(block(x), want)
    assert graphs


def test_other_tensors_beside_a_block() -> None:
    """Buffers without storage, and modules whose weights do not exist yet."""
    block, x = make_block(), torch.randn(2, 5, 32, dtype=torch.float64)
    with torch.no_grad():
        want = block(x)
        block.register_buffer("sparse", torch.eye(3).to_sparse())
        block.lazy = nn.LazyLinear(3)
        assert is_whole(block, x) and torch.equal(block(x), want)


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
        assert is_whole(block, x)
        block.mlp.drop2.train()
        torch.manual_seed(0)
        got = block(x)
        torch.manual_seed(0)
        assert_near(got, literal(block, x))
        assert not torch.allclose(block(x), got)


def test_parts_set_past_torch_are_called() -> None:
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    for name in ("drop_path", "mlp", "norm2"):
        block: Any = make_block()
        part = Double(block.get_submodule(name))
        with torch.no_grad():
            before = block(x)
            object.__setattr__(block, name, part)
            assert not is_whole(block, x)
            assert_near(block(x), literal(block, x))
            assert not torch.allclose(block(x), before)
    other: Any = make_block()
    del other.drop_path
    other.drop_path = lambda y: 0 * y
    with torch.no_grad():
        assert torch.equal(other(x), x)


@pytest.mark.parametrize("shape", [(1, 3, 192), (4, 197, 192)])
def test_batched_gradients(shape: tuple[int, ...]) -> None:
    """Also where oneDNN's operator multiplies."""
    block, x = Block(192, 3, 3.0), torch.randn(shape).requires_grad_()
    y = block(x)[:, 0, :4].sum(0)
    learned = [x, block.mlp.fc1.weight, block.attn.proj.bias]
    batched = torch.autograd.grad(y, learned, torch.eye(4), is_grads_batched=True, retain_graph=True)
    for row in range(4):
        for got, want in zip(batched, torch.autograd.grad(y[row], learned, retain_graph=True), strict=True):
            torch.testing.assert_close(got[row], want, rtol=1e-4, atol=1e-5)


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
            assert not is_whole(block, x)
        with pytest.raises(t2t_fast.BackendUnavailable), t2t_fast.use_backend("native"):
            block(x)


@pytest.mark.parametrize("change", ["nothing", "assign", "functional", "move"])
def test_weights_are_freed_when_their_owner_is(change: str) -> None:
    """Without waiting for the garbage collector, and without another call of the block."""
    block, x = make_block(), torch.randn(2, 5, 32, dtype=torch.float64)
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            block(x)
            assert is_whole(block, x)
            weights = [weakref.ref(weight) for weight in block.parameters()]
            if change == "nothing":
                del block
            elif change == "assign":
                block.load_state_dict({k: v.clone() for k, v in block.state_dict().items()}, assign=True)
            elif change == "functional":
                others = {name: weight.clone() for name, weight in block.named_parameters()}
                weights = [weakref.ref(weight) for weight in others.values()]
                torch.func.functional_call(block, others, (x,))
                del others
            else:
                storages = [weakref.ref(weight.untyped_storage()) for weight in block.parameters()]
                weights = storages
                block.to("meta")
        assert not [ref for ref in weights if ref() is not None]
    finally:
        gc.enable()


def test_eager_calls_do_not_compile_again() -> None:
    block, x = make_block(), torch.randn(2, 5, 32, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(x)
        block(x)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert_near(compiled(x), block(x))


def test_a_small_batch_decides_nothing_for_a_large_one() -> None:
    block = make_block(torch.float32)
    small, large = torch.randn(1, 2, 32), torch.randn(8, 197, 32)
    with torch.no_grad():
        found = block_weights.weights_for(block, small), block_weights.weights_for(block, large)
        assert [weights is not None and weights.fc1.onednn is not None for weights in found] in (
            [True] * 2,
            [False] * 2,
        )


def test_after_inference_mode() -> None:
    block = Block(32, 2, 3.0, norm_layer=partial(nn.LayerNorm, elementwise_affine=False)).eval()
    x = torch.randn(2, 5, 32)
    with torch.inference_mode():
        want = block(x)
    got = block(x.requires_grad_())
    got.sum().backward()
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_memory_than_op_by_op(dtype: torch.dtype) -> None:
    """Queries, keys and values are freed before the MLP runs."""
    block, x = Block(96, 3, 3.0).to(dtype).eval(), torch.randn(8, 64, 96).to(dtype)

    def peak(function: Callable[[Tensor], Tensor]) -> int:
        with torch.no_grad():
            function(x)
            return memory.record(lambda: function(x), "cpu")[0].peak

    def op_by_op(x: Tensor) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(block_module, "weights_for", lambda *args: None)
            return block(x)

    assert is_whole(block, x) or torch.is_grad_enabled()
    assert peak(block) <= 1.05 * peak(op_by_op)


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
    for factor in (2.0, 0.5, 1.0):  # whose memory may be that of the weights before
        state = {name: factor * weight for name, weight in frozen.state_dict().items()}
        frozen.load_state_dict(state, assign=True)
        assert torch.equal(copy.deepcopy(frozen)(images), frozen(images))
    proj = frozen.model.blocks[0].attn.proj
    want = frozen(images)
    proj.bias = nn.Parameter(proj.bias.clone())  # no buffer any more
    assert "bias" not in proj._buffers and torch.allclose(frozen(images), want, rtol=1e-2, atol=1e-2)
    before = frozen(images)
    frozen.model.blocks[0].mlp.fc1.gelu = False
    assert torch.equal(frozen(images), copy.deepcopy(frozen)(images)) and not torch.allclose(frozen(images), before)


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
