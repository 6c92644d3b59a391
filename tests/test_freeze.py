"""freeze: the same logits from every family, in every dtype; what it leaves alone; what it refuses."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from doubles import T2T_ViT, randomize
from small_models import FAMILIES, quickest, relative_error, seeded_images, small, smallest
from torch import Tensor, nn

import t2t_fast
from t2t_fast.deploy.freeze import _compare
from t2t_fast.layers.packed_linear import PackedLinear
from t2t_fast.ops.block.aten import why_not_packed

every_family = pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)
DTYPES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@every_family
def test_same_logits(name: str) -> None:
    model, images = small(name, qkv_bias=True, drop_rate=0.1, drop_path_rate=0.2).train(), seeded_images(5, 32, 32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    frozen = t2t_fast.freeze(model)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    want = model.double().eval()(images.double())
    got = frozen(images)
    assert not got.requires_grad
    assert relative_error(got, want) < DTYPES[torch.float32]
    assert relative_error(frozen(images[:1]), want[:1]) < DTYPES[torch.float32]
    assert frozen(images[:0]).shape == (0, 5)
    assert not [m for m in frozen.modules() if isinstance(m, nn.Dropout) or getattr(m, "drop_prob", 0)]
    norms = 4 + (0 if "_c_" in name else 4)  # of two blocks, and of the token layers
    assert frozen.notes[0].startswith(f"{norms} LayerNorms")
    assert [n.elementwise_affine for n in frozen.modules() if isinstance(n, nn.LayerNorm)] == [False] * norms + [True]
    assert "logits of a probe batch agree" in frozen.notes[-1]
    assert frozen.notes[-1] in repr(frozen)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    model, images = small("t2t_vit_7").eval(), seeded_images(4, 32, 32)
    want = copy.deepcopy(model).double()(images.double())
    for frozen in (t2t_fast.freeze(model, dtype), t2t_fast.freeze(copy.deepcopy(model).to(dtype))):
        assert frozen.dtype == dtype
        for given in (images, images.to(dtype)):
            got = frozen(given)
            assert got.dtype == dtype
            assert relative_error(got, want) < DTYPES[dtype]
    moved = t2t_fast.freeze(model).to(dtype)  # after its weights were packed for another dtype
    moved(images)
    assert relative_error(moved(images), want) < max(DTYPES[dtype], DTYPES[torch.float32])


@every_family
@pytest.mark.usefixtures("_fresh_compiler")
def test_compile_and_export(name: str) -> None:
    frozen, images = t2t_fast.freeze(quickest(name)), seeded_images(3, 32, 32)
    want = frozen(images)
    assert relative_error(torch.compile(frozen, fullgraph=True, backend="aot_eager")(images), want) < 1e-5
    exported = torch.export.export(frozen, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    assert not [node for node in exported.graph.nodes if "t2t_fast" in str(node.target) or "mkldnn" in str(node.target)]
    assert relative_error(exported.module()(seeded_images(7, 32, 32)[:3]), want) < 1e-5


@pytest.fixture
def _fresh_compiler() -> None:
    torch.compiler.reset()


def test_copies_and_pickles() -> None:
    frozen, images = t2t_fast.freeze(small("t2t_vit_7")), seeded_images(2, 32, 32)
    want = frozen(images)
    for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert torch.equal(other(images), want)
    other = t2t_fast.freeze(small("t2t_vit_7", num_classes=5))
    other.load_state_dict(frozen.state_dict())
    assert torch.equal(other(images), want)


def test_weights_loaded_later_are_used() -> None:
    frozen, images = t2t_fast.freeze(small("t2t_vit_7")), seeded_images(2, 32, 32)
    want = frozen(images)  # packed for these weights
    with torch.no_grad():
        changed = {key: 1.5 * value for key, value in frozen.state_dict().items()}
    frozen.load_state_dict(changed)
    assert relative_error(frozen(images), want) > 1e-2
    fresh = t2t_fast.freeze(small("t2t_vit_7"))
    fresh.load_state_dict(changed)
    assert torch.equal(fresh(images), frozen(images))


def test_what_is_watched_or_replaced_stays() -> None:
    class Adapted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0.5

    model, images = small("t2t_vit_7").eval(), seeded_images(2, 32, 32)
    old = model.blocks[0].mlp.fc1
    adapted = Adapted(old.in_features, old.out_features)
    adapted.load_state_dict(old.state_dict())
    model.blocks[0].mlp.fc1 = adapted
    seen: list[Tensor] = []
    model.blocks[1].attn.qkv.register_forward_hook(lambda module, args, y: seen.append(y))
    frozen = t2t_fast.freeze(model)
    assert isinstance(frozen.model.blocks[0].mlp.fc1, Adapted)
    assert isinstance(frozen.model.blocks[0].mlp.fc2, PackedLinear)
    seen.clear()
    assert relative_error(frozen(images), model(images)) < 1e-5
    assert len(seen) == 2  # the hook came along with the copy
    assert "6 LayerNorms" in frozen.notes[0]


@pytest.mark.parametrize("name", ["t2t_vit_7", "t2t_vit_t_14"])
def test_flat_images_and_weights_rounded_before(name: str) -> None:
    """Rows of centred weights that were rounded to 16 bits have a mean, which a flat patch multiplies by much."""
    model = small(name).eval()
    images = (2 + 0.02 * seeded_images(3, 32, 32)).bfloat16().float()
    images[0] = 5
    half = t2t_fast.freeze(model, torch.bfloat16)
    loaded = t2t_fast.freeze(model)
    loaded.load_state_dict({key: value.float() for key, value in half.state_dict().items()})
    for frozen in (t2t_fast.freeze(model), t2t_fast.freeze(half, torch.float32), copy.deepcopy(half).double(), loaded):
        with t2t_fast.use_backend("reference"):
            want = copy.deepcopy(frozen).double()(images.double())
        assert relative_error(frozen(images), want) < 1e-4
    assert relative_error(half(images), model(images)) < DTYPES[torch.bfloat16]


def test_token_layers_in_triton() -> None:
    model, images = small("t2t_vit_7", depth=1).eval(), seeded_images(2, 32, 32)
    frozen = t2t_fast.freeze(model)
    with torch.no_grad(), t2t_fast.use_backend("triton"):
        told = t2t_fast.explain(frozen.model.tokens_to_token, images).backends()
        assert set().union(*told.values()) == {"triton"}
        got = frozen.model.tokens_to_token(images)
    assert relative_error(got, model.tokens_to_token(images)) < 1e-5


@pytest.mark.parametrize("name", ["t2t_vit_7", "t2t_vit_t_14"])
@pytest.mark.parametrize("before", [True, False])
def test_hooks_in_token_layers(name: str, before: bool) -> None:
    """Watched before freezing, what lies between a norm and its Linear stays; watched later, all are called."""
    images = seeded_images(2, 32, 32)
    parts = [n for n, _ in small(name).tokens_to_token.attention1.named_modules() if n]
    for part in parts:
        model, seen = smallest(name).eval(), list[int]()
        want = model(images)
        frozen = None if before else t2t_fast.freeze(model)
        layer = (frozen.model if frozen else model).tokens_to_token.attention1
        layer.get_submodule(part).register_forward_hook(lambda *args, s=seen: s.append(1))
        frozen = frozen or t2t_fast.freeze(model)
        seen.clear()
        assert relative_error(frozen(images), want) < 1e-5, part
        assert len(seen) == 1, part


@pytest.mark.parametrize("name", ["t2t_vit_7", "t2t_vit_t_14"])
def test_norms_without_weights_of_ones_own(name: str) -> None:
    model, images = small(name).eval(), seeded_images(2, 32, 32)
    for layer in (model.tokens_to_token.attention1, model.tokens_to_token.attention2):
        for part in ("norm1", "norm2"):
            norm = layer.get_submodule(part)
            with torch.no_grad():
                norm.weight.fill_(1)
                norm.bias.zero_()
    want = model(images)
    for layer in (model.tokens_to_token.attention1, model.tokens_to_token.attention2):
        for part in ("norm1", "norm2"):
            norm = layer.get_submodule(part)
            setattr(layer, part, nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False))
    assert relative_error(model(images), want) < 1e-5
    assert relative_error(t2t_fast.freeze(model)(images), want) < 1e-5


def test_branches_that_somebody_changes_keep_their_norms() -> None:
    model, images = small("t2t_vit_7").eval(), seeded_images(2, 32, 32)
    seen: list[Tensor] = []
    model.blocks[0].attn.register_forward_pre_hook(lambda module, args: (2 * args[0] + 1,))
    model.blocks[1].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    frozen = t2t_fast.freeze(model)
    assert "6 LayerNorms" in frozen.notes[0]
    seen.clear()
    assert relative_error(frozen(images), model(images)) < 1e-5
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)


def test_foreign_branches_are_called() -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x) + 1

    model, images = small("t2t_vit_7").eval(), seeded_images(2, 32, 32)
    model.blocks[0].attn = Wrapped(model.blocks[0].attn)
    model.blocks[1].mlp = nn.Sequential(nn.Linear(256, 256), nn.GELU())
    frozen = t2t_fast.freeze(model)
    assert "6 LayerNorms" in frozen.notes[0]
    assert relative_error(frozen(images), model(images)) < 1e-5


def test_shared_weights_are_not_folded_twice() -> None:
    model, images = small("t2t_vit_7").eval(), seeded_images(2, 32, 32)
    model.blocks[1].attn.qkv.weight = model.blocks[0].attn.qkv.weight
    model.blocks[1].mlp = model.blocks[0].mlp
    frozen = t2t_fast.freeze(model)
    assert "4 LayerNorms" in frozen.notes[0]
    assert relative_error(frozen(images), model(images)) < 1e-5


def test_watched_dropouts_stay() -> None:
    model, seen = small("t2t_vit_7").eval(), list[int]()
    model.pos_drop.register_forward_hook(lambda *args: seen.append(1))
    frozen = t2t_fast.freeze(model)
    seen.clear()
    frozen(seeded_images(2, 32, 32))
    assert seen == [1]


def test_under_autocast_and_in_inference_mode() -> None:
    model, images = small("t2t_vit_7").eval(), seeded_images(2, 32, 32)
    want = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(t2t_fast.freeze(model)(images), want) < 4e-2
    with torch.inference_mode():
        frozen = t2t_fast.freeze(model)
        assert relative_error(frozen(images), want) < 1e-5
        frozen.load_state_dict({key: 1.5 * value for key, value in frozen.state_dict().items()})
        fresh = t2t_fast.freeze(small("t2t_vit_7"))
        fresh.load_state_dict(frozen.state_dict())
        assert torch.equal(frozen(images), fresh(images))
        assert relative_error(frozen(images), want) > 1e-2
    with torch.inference_mode():  # whose tensors do not tell when they are written to
        inner = frozen.double().float()
        assert relative_error(inner(images), fresh(images)) < 1e-5


def test_threads_of_different_precision() -> None:
    frozen, images = t2t_fast.freeze(small("t2t_vit_7")), seeded_images(2, 32, 32)
    want, errors = frozen(images), dict[bool, float]()

    def run(autocast: bool) -> None:
        worst = 0.0
        for _ in range(20):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                worst = max(worst, relative_error(frozen(images), want))
        errors[autocast] = worst

    threads = [threading.Thread(target=run, args=(autocast,)) for autocast in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors[False] < 1e-6
    assert errors[True] < 4e-2


@torch.no_grad()
def test_features_and_another_dtype_of_a_frozen_model() -> None:
    model, images = small("t2t_vit_7").eval(), seeded_images(2, 32, 32)
    frozen = t2t_fast.freeze(model)
    assert t2t_fast.freeze(frozen) is t2t_fast.freeze(frozen, torch.float32) is frozen
    assert frozen.num_classes == 5
    assert relative_error(frozen.forward_features(images), model.forward_features(images)) < 1e-5
    got, want = (m.forward_intermediates(images.double() if m is frozen else images) for m in (frozen, model))
    for a, b in zip(got[1], want[1], strict=True):
        assert relative_error(a, b) < 1e-5
    half = t2t_fast.freeze(frozen, torch.bfloat16)
    assert (half.dtype, frozen.dtype) == (torch.bfloat16, torch.float32)
    assert "weights cast from torch.float32 to torch.bfloat16" in half.notes
    assert relative_error(half(images), model(images)) < DTYPES[torch.bfloat16]


def test_takes_what_optimize_takes() -> None:
    theirs, images = randomize(T2T_ViT()), seeded_images(2, 64, 64)
    assert relative_error(t2t_fast.freeze(theirs)(images), theirs.eval()(images)) < 1e-5
    with pytest.raises(TypeError, match="model must be a T2T-ViT"):
        t2t_fast.freeze(nn.Linear(2, 2))


def test_refusals() -> None:
    model = small("t2t_vit_7")
    with pytest.raises(TypeError, match=r"dtype .*torch.float64, .* None, got torch.int8"):
        t2t_fast.freeze(model, torch.int8)
    frozen = t2t_fast.freeze(model)
    with pytest.raises(RuntimeError, match="a frozen model has nothing to train"):
        frozen.train()
    assert frozen.eval() is frozen
    with torch.no_grad():
        frozen.model.blocks[1].norm2.eps = 1.0
    with pytest.raises(RuntimeError, match=r"freezing changed the logits"):
        _compare(model, frozen)


def test_weights_beyond_the_dtype() -> None:
    model = small("t2t_vit_7")
    with torch.no_grad():
        model.head.weight.mul_(1e6)
    with pytest.raises(RuntimeError, match=r"not finite in torch.float32 or in torch.float16, whose range"):
        t2t_fast.freeze(model, torch.float16)
    with pytest.raises(ValueError, match="model is on the meta device"):
        t2t_fast.freeze(model.to("meta"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_explain_tells_of_a_frozen_model(dtype: torch.dtype) -> None:
    frozen, images = t2t_fast.freeze(small("t2t_vit_7"), dtype), seeded_images(2, 32, 32)
    told = t2t_fast.explain(frozen, images)
    assert told.backends()["linear"] == told.backends()["attention"] == {"aten"}
    if not why_not_packed(images.to(dtype), torch.zeros(1, dtype=dtype)):
        assert "oneDNN, packed weights" in str(told)
    with t2t_fast.use_backend("reference"):
        asked = t2t_fast.explain(frozen, images).backends()
        assert set().union(*asked.values()) == {"reference"}
