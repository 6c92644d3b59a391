"""The last block for the cls token alone: equal to the full computation, which whoever watches or changes it gets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import assert_close, gradients
from small_models import FAMILIES, flat_gradients, relative_error, seeded_images, small, smallest
from timm.layers import DropPath
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import t2t_fast
from t2t_fast import ops
from t2t_fast.bench import samples
from t2t_fast.layers import Attention, Block, SELayer
from t2t_fast.layers.mlp import Mlp
from t2t_fast.macs import count_macs
from t2t_fast.ops.softmax_attention import reference

ALONE = ["last block: for the cls token alone"]
BLOCKS = {
    "standard": Block,
    "se": partial(Block, block_type="se"),
    "se_mlp": partial(Block, block_type="se_mlp"),
    "ghost": partial(Block, block_type="ghost"),
    "dense": partial(t2t_fast.layers.DenseBlock, growth_rate=8),
}
every_family = pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)


def in_full(model: Any, images: Tensor) -> Tensor:
    """The logits by way of all tokens."""
    return model.forward_head(model.forward_features(images))


def told(model: nn.Module, images: Tensor) -> list[str]:
    return t2t_fast.explain(model, images).notes


def expected(name: str) -> list[str]:
    kind = "last block: for all tokens: the last block, its attention or its MLP is of another kind"
    return [kind] if name == FAMILIES["se_mlp"] else ALONE


@every_family
def test_logits_and_gradients(name: str) -> None:
    images = seeded_images(3, 32, 48).double()
    model: Any = small(name, img_size=(32, 48), drop_path_rate=0.1).double()
    assert told(model, images) == expected(name)
    for mode in (True, False):
        model.train(mode)
        found = []
        for function in (model, partial(in_full, model)):
            model.zero_grad()
            torch.manual_seed(5)
            logits = function(images)
            logits.sin().sum().backward()
            found.append((logits, flat_gradients(model)))
        assert relative_error(found[0][0], found[1][0]) < 1e-13
        assert relative_error(found[0][1], found[1][1]) < 1e-12


@every_family
def test_ten_training_steps_and_their_average(name: str) -> None:
    images, labels = seeded_images(4, 32, 32).double(), torch.tensor([0, 1, 2, 3])
    found = []
    for function in (lambda model, x: model(x), in_full):
        model: Any = smallest(name, drop_path_rate=0.1).double().train()
        average = ModelEmaV3(model, decay=0.8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        torch.manual_seed(2)
        for _ in range(10):
            optimizer.zero_grad()
            nn.functional.cross_entropy(function(model, images), labels).backward()
            optimizer.step()
            average.update(model)
        found.append((model.state_dict(), average.module.state_dict(), smallest(name).double().state_dict()))
    for key, value in found[0][0].items():
        assert relative_error(value, found[1][0][key]) < 1e-11, key
        assert relative_error(found[0][1][key], found[1][1][key]) < 1e-11, key
    assert not torch.equal(found[0][0]["head.weight"], found[0][2]["head.weight"])


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen(name: str, dtype: torch.dtype) -> None:
    frozen, images = t2t_fast.freeze(small(name, img_size=64).eval(), dtype), seeded_images(2, 64, 64).to(dtype)
    assert told(frozen, images) == expected(name)
    with torch.no_grad():
        assert relative_error(frozen(images), in_full(frozen.model, images)) < {torch.float32: 5e-6}.get(dtype, 2e-2)
        for module in frozen.model.blocks[-1].modules():  # written since: nothing that was kept is used
            if getattr(module, "weight", None) is not None:
                module.weight.mul_(1.25)
        assert relative_error(frozen(images), in_full(frozen.model, images)) < {torch.float32: 5e-6}.get(dtype, 2e-2)


@pytest.mark.parametrize("name", ["t2t_vit_7", "t2t_vit_14_se"])
def test_gradient_checkpointing(name: str) -> None:
    model, images = small(name, token_drop_rate=0.0).train(), seeded_images(2, 32, 32)
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        assert told(model, images) == ALONE
        model(images).sin().sum().backward()
        found.append(flat_gradients(model))
    assert relative_error(found[1], found[0]) < 1e-6


def sizes_of_linears(program: torch.export.ExportedProgram) -> set[tuple[int, ...]]:
    """Tokens and channels of the Linears' results."""
    graphs = [module for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    nodes = [node for graph in graphs for node in graph.graph.nodes if node.target is torch.ops.aten.linear.default]
    return {tuple(node.meta["val"].shape[1:]) for node in nodes}


@every_family
@pytest.mark.parametrize("frozen", [False, True], ids=["as it is", "frozen"])
def test_exported(name: str, frozen: bool) -> None:
    model: Any = smallest(name).eval()
    images = seeded_images(3, 32, 32)
    want = in_full(model, images)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(t2t_fast.freeze(model) if frozen else model, (images[:2],), dynamic_shapes=(batch,))
    assert relative_error(program.module()(images), want) < 5e-6
    hidden = model.blocks[-1].mlp.fc1.out_features
    assert ((1, hidden) in sizes_of_linears(program)) == (name != FAMILIES["se_mlp"])


@pytest.mark.slow
def test_compiled() -> None:
    model, images = small("t2t_vit_7", token_drop_rate=0.0).train(), seeded_images(2, 32, 32)
    compiled = torch.compile(model, fullgraph=True)
    found = []
    for function in (compiled, partial(in_full, model)):
        model.zero_grad()
        function(images).sin().sum().backward()
        found.append(flat_gradients(model))
    assert relative_error(found[0], found[1]) < 1e-5


def test_compiled_graph_has_one_token() -> None:
    model, images, shapes = small("t2t_vit_14_se").eval(), seeded_images(2, 32, 32), []

    def backend(graph: torch.fx.GraphModule, unused: Any) -> torch.fx.GraphModule:
        values = (node.meta.get("example_value") for node in graph.graph.nodes)
        shapes.extend(value.shape for value in values if isinstance(value, Tensor))
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(model, backend=backend, fullgraph=True)(images)
        assert relative_error(got, in_full(model, images)) < 5e-6
    assert (2, 1, 384) in shapes and (2, 5, 1152) in shapes and (2, 1, 1152) in shapes


def test_multiply_accumulates_by_hand() -> None:
    width, ratio, tokens = 256, 2, 197
    with torch.device("meta"):
        macs, average = (count_macs(t2t_fast.create_model("t2t_vit_7", **k)) for k in ({}, {"global_pool": "avg"}))
    per_token = (2 + 2 * ratio) * width**2 + 2 * tokens * width  # query and projection, MLP; scores and their use
    assert macs.macs - macs.executed == (tokens - 1) * per_token
    assert average.macs == average.executed == macs.macs


@pytest.mark.parametrize("name", ["t2t_vit_14_se", "t2t_vit_16_ghost", "t2t_vit_dense"])
def test_fewer_multiply_accumulates(name: str) -> None:
    with torch.device("meta"):
        macs = count_macs(t2t_fast.create_model(name))
    assert 0.9 * macs.macs < macs.executed < 0.99 * macs.macs


# Where all tokens are computed


def nothing(*args: Any) -> None:
    return None


class Foreign(Tensor):
    """As quantised and distributed weights are."""


def exchange_weight(model: Any) -> None:
    fc1 = model.blocks[-1].mlp.fc1
    fc1.weight = nn.Parameter(fc1.weight.detach().as_subclass(Foreign))
    assert type(fc1.weight) is Foreign


def patch(module: Any) -> None:
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs)


class Shifted(nn.Linear):
    """A Linear of another class."""


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "hook on the block": (lambda m: m.blocks[-1].register_forward_hook(nothing), "hooked"),
    "backward hook": (lambda m: m.blocks[-1].register_full_backward_hook(nothing), "hooked"),
    "hook on the attention": (lambda m: m.blocks[-1].attn.register_forward_hook(nothing), "hooked"),
    "hook on a Linear": (lambda m: m.blocks[-1].mlp.fc2.register_forward_pre_hook(nothing), "hooked"),
    "hook on a dropout": (lambda m: m.blocks[-1].attn.attn_drop.register_forward_hook(nothing), "hooked"),
    "hook on the norm": (lambda m: m.norm.register_forward_hook(nothing), "hooked"),
    "patched part": (lambda m: patch(m.blocks[-1].norm2), "patched"),
    "compiled part": (lambda m: m.blocks[-1].mlp.compile(backend="eager"), "compiled"),
    "wrapped block": (lambda m: m.blocks.append(checkpoint_wrapper(m.blocks.pop(-1))), "another kind"),
    "compiled block": (lambda m: m.blocks.append(torch.compile(m.blocks.pop(-1), backend="eager")), "another kind"),
    "block of another class": (lambda m: m.blocks.append(nn.Identity()), "another kind"),
    "gate as a part": (lambda m: setattr(m.blocks[-1].mlp, "norm", SELayer(512)), "may mix tokens"),
    "class of a Linear": (lambda m: setattr(m.blocks[-1].mlp.fc1, "__class__", Shifted), "may mix tokens"),
    "norm over two dimensions": (lambda m: setattr(m, "norm", nn.LayerNorm((5, 256))), "more than the channels"),
    "norm of another class": (lambda m: setattr(m, "norm", nn.GroupNorm(1, 5)), "norm is of a kind"),
    "norm2 over two dimensions": (lambda m: setattr(m.blocks[-1], "norm2", nn.LayerNorm((5, 256))), "more than"),
    "hidden part": (lambda m: vars(m.blocks[-1].mlp).update(act=nn.Identity()), "hides"),
    "hidden MLP": (lambda m: vars(m.blocks[-1]).update(mlp=nn.Identity()), "hides"),
    "weight of another kind": (exchange_weight, "no plain tensor"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_reasons(change: str) -> None:
    model: Any = small("t2t_vit_7").eval()
    images = seeded_images(2, 32, 32)
    assert told(model, images) == ALONE
    apply, words = CHANGES[change]
    apply(model)
    (line,) = told(model, images)
    assert line.startswith("last block: for all tokens: ") and words in line
    assert relative_error(model(images), in_full(model, images)) < 1e-6


@pytest.mark.parametrize("part", ["", "attn", "mlp", "mlp.fc1", "norm1"])
def test_hooks_see_all_tokens(part: str) -> None:
    model, images, seen = small("t2t_vit_7").eval(), seeded_images(2, 32, 32), []
    model(images)
    handle = model.blocks[-1].get_submodule(part).register_forward_hook(lambda m, args, y: seen.append(y.shape[1]))
    model(images)
    handle.remove()
    assert seen == [5] and told(model, images) == ALONE


def test_global_hooks_see_all_tokens() -> None:
    model, images, seen = small("t2t_vit_7").eval(), seeded_images(2, 32, 32), []
    names = {module: name for name, module in model.named_modules()}
    with nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append((names.get(m), y.shape))):
        model(images)
    assert dict(seen)["norm"] == (2, 5, 256) and dict(seen)["blocks.1.mlp"] == (2, 5, 256)


def test_an_earlier_block_may_change_the_last() -> None:
    model, images, seen = small("t2t_vit_7").eval(), seeded_images(2, 32, 32), []

    def add_hook(*args: Any) -> None:
        model.norm.register_forward_hook(lambda m, args, y: seen.append(y.shape[1]))

    model.blocks[0].register_forward_hook(add_hook)
    model(images)
    assert seen == [5]


@pytest.mark.parametrize("cls", [Attention, Mlp, Block, nn.Linear, nn.LayerNorm, DropPath])
def test_patched_classes(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, forward = small("t2t_vit_7", drop_path_rate=0.1).eval(), seeded_images(2, 32, 32), cls.forward
    monkeypatch.setattr(cls, "forward", lambda *args, **kwargs: forward(*args, **kwargs))
    assert told(model, images) == ["last block: for all tokens: a class has another forward"]


@pytest.mark.parametrize("name", ["forward_features", "forward_head", "_run_block", "_embed"])
@pytest.mark.parametrize("how", ["subclass", "class", "instance"])
def test_other_methods_are_called(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = small("t2t_vit_7").eval()
    images, original, shapes = seeded_images(2, 32, 32), getattr(t2t_fast.T2TViT, name), []

    def method(self: Any, *args: Any) -> Tensor:
        result = original(self, *args)
        shapes.extend(value.shape for value in (*args, result) if isinstance(value, Tensor))
        return result

    if how == "subclass":
        model.__class__ = type("Other", (t2t_fast.T2TViT,), {name: method})
    elif how == "class":
        monkeypatch.setattr(t2t_fast.T2TViT, name, method)
    else:
        setattr(model, name, partial(method, model))
    assert told(model, images) == []
    shapes.clear()
    got = model(images)
    assert shapes and all(shape[1] == 5 for shape in shapes if len(shape) == 3)
    assert relative_error(got, in_full(model, images)) < 1e-6


def test_other_pooling() -> None:
    images = seeded_images(2, 32, 32)
    for pool in ("avg", ""):
        model: Any = small("t2t_vit_7", global_pool=pool).eval()
        assert told(model, images) == []
        assert relative_error(model(images), in_full(model, images)) < 1e-6


def test_no_blocks() -> None:
    model: Any = small("t2t_vit_7").eval()
    model.blocks = nn.ModuleList()
    assert model(seeded_images(2, 32, 32)).shape == (2, 5)


# Blocks


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("num_tokens", [1, 3, 7])
@pytest.mark.parametrize("bias", [False, True])
def test_first_tokens_of_a_block(kind: str, num_tokens: int, bias: bool) -> None:
    make: Any = BLOCKS[kind]
    block = make(dim=32, num_heads=2, mlp_ratio=3, qkv_bias=bias, drop_path=0.5).double().train()
    x = torch.randn(4, 7, 32, dtype=torch.float64).requires_grad_()
    found = []
    for function in (lambda: block(x, num_tokens), lambda: block(x)[:, :num_tokens]):
        torch.manual_seed(1)
        y = function()
        grads = torch.autograd.grad(y.sin().sum(), [x, *block.parameters()])
        found.append((y, torch.cat([grad.flatten() for grad in grads])))
    for got, want in zip(*found, strict=True):
        assert relative_error(got, want) < 1e-12


def test_dense_blocks_call_a_patched_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is known: with the tokens alone."""
    model, images, forward, seen = small("t2t_vit_dense").eval(), seeded_images(2, 32, 32), Block.forward, []
    monkeypatch.setattr(Block, "forward", lambda self, x: seen.append(x.shape[1]) or forward(self, x))
    assert told(model, images) == ["last block: for all tokens: a class has another forward"]
    assert seen == [5, 5]


class Mixing(nn.Module):
    """Mixes tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1).flip(1)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("part", ["attn", "mlp", "drop_path", "norm1", "norm2", "dense_linear"])
def test_first_tokens_of_a_block_with_a_part_that_mixes(kind: str, part: str) -> None:
    make: Any = BLOCKS[kind]
    block = make(dim=32, num_heads=2, mlp_ratio=3).double()
    if hasattr(block, part):
        setattr(block, part, Mixing())
    x = torch.randn(4, 7, 32, dtype=torch.float64)
    assert relative_error(block(x, 2), block(x)[:, :2]) < 1e-13


# Attention with fewer queries than keys


@pytest.mark.parametrize("backend", ["reference", "aten"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(2, 6, 1, 61, 16), (3, 2, 5, 17, 8), (1, 1, 9, 4, 8)])
def test_fewer_queries(backend: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    check_queries(backend, dtype, *sizes)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "sizes", [(40, 6, 1, 197, 16), (5, 6, 70, 197, 16), (3, 2, 700, 1100, 8), (1, 1, 33, 40000, 4)]
)
def test_fewer_queries_in_bfloat16_blocks(sizes: tuple[int, ...]) -> None:
    """Groups of images, blocks of rows, and their remainders."""
    batch, heads, queries, tokens, _ = sizes
    assert batch * heads * queries * tokens >= 1 << 15
    check_queries("aten", torch.bfloat16, *sizes)


def check_queries(
    backend: str, dtype: torch.dtype, batch: int, heads: int, queries: int, tokens: int, dim: int
) -> None:
    most = max(queries, tokens)
    made = samples.make("attention", samples.Sizes(batch=batch, tokens=most, heads=heads, dim=dim), dtype)
    q, k, v = made["q"][:, :, :queries], made["k"][:, :, :tokens], made["v"][:, :, :tokens]
    scale, exact = made["scale"], [t.double() for t in (q, k, v)]
    want = torch.softmax(torch.einsum("bhmd,bhnd->bhmn", exact[0], exact[1]) * scale, -1) @ exact[2]
    got = ops.attention(q, k, v, scale, backend=backend)
    assert got.dtype == dtype
    assert_close(got, want, dtype, tokens)
    grad = torch.randn_like(want).to(dtype)
    found = gradients(lambda q, k, v: ops.attention(q, k, v, scale, backend=backend), (q, k, v), grad)
    wanted = reference.attention_backward(grad.double(), *exact, scale)
    for g, w in zip(found, wanted, strict=True):
        assert_close(g, w, dtype, most * dim, grad=True)


def test_keys_must_fit_the_queries() -> None:
    q = torch.randn(2, 3, 1, 4)
    for shape in ((2, 3, 5, 6), (2, 2, 5, 4), (1, 3, 5, 4)):
        with pytest.raises(ValueError, match=r"k must have shape .*number of tokens"):
            ops.attention(q, torch.randn(shape), torch.randn(shape), 0.5)
    with pytest.raises(ValueError, match="v must have shape the shape of k"):
        ops.attention(q, torch.randn(2, 3, 5, 4), torch.randn(2, 3, 6, 4), 0.5)


@pytest.mark.parametrize("frozen", [False, True])
def test_pruned_heads(frozen: bool) -> None:
    """The last block's attention may be narrower than the tokens."""
    model = small("t2t_vit_7").eval().double()
    attn: Any = model.blocks[-1].attn
    width, narrow = model.embed_dim, model.embed_dim // 2
    attn.num_heads //= 2
    attn.qkv = torch.nn.Linear(width, 3 * narrow, dtype=torch.float64)
    attn.proj = torch.nn.Linear(narrow, width, dtype=torch.float64)
    images = seeded_images(2, 32, 32).double()
    with torch.no_grad():
        want = model.forward_head(model.forward_features(images))
        run: Any = t2t_fast.freeze(model) if frozen else model
        torch.testing.assert_close(run(images), want, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(model(images), want, rtol=1e-9, atol=1e-11)
