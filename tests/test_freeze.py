"""freeze: the same logits from every family, in every dtype; what it leaves alone; what it refuses."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from doubles import T2T_ViT, randomize
from small_models import FAMILIES, relative_error, seeded_images, small
from torch import Tensor, nn

import t2t_fast
from t2t_fast.layers.packed_linear import PackedLinear
from t2t_fast.models.freeze import _compare

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
    assert any("2 LayerNorms" in note or "4 LayerNorms" in note for note in frozen.notes)
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
    moved = t2t_fast.freeze(model).to(dtype)  # after its weights were laid out for another dtype
    moved(images)
    assert relative_error(moved(images), want) < max(DTYPES[dtype], DTYPES[torch.float32])


@every_family
@pytest.mark.usefixtures("_fresh_compiler")
def test_compile_and_export(name: str) -> None:
    frozen, images = t2t_fast.freeze(small(name, depth=2 if "dense" in name else 1)), seeded_images(3, 32, 32)
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
    want = frozen(images)  # laid out for these weights
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
    assert "2 LayerNorms" in frozen.notes[0]


def test_takes_what_optimize_takes() -> None:
    theirs, images = randomize(T2T_ViT()), seeded_images(2, 64, 64)
    assert relative_error(t2t_fast.freeze(theirs)(images), theirs.eval()(images)) < 1e-5
    with pytest.raises(TypeError, match="model must be a T2T-ViT"):
        t2t_fast.freeze(nn.Linear(2, 2))


def test_refusals() -> None:
    model = small("t2t_vit_7")
    with pytest.raises(TypeError, match=r"dtype must be one of torch.float64, .* or None, got torch.int8"):
        t2t_fast.freeze(model, torch.int8)
    frozen = t2t_fast.freeze(model)
    with pytest.raises(RuntimeError, match="a frozen model has nothing to train"):
        frozen.train()
    assert frozen.eval() is frozen
    with torch.no_grad():
        frozen.model.blocks[1].norm2.eps = 1.0
    with pytest.raises(RuntimeError, match=r"freezing changed the logits of a probe batch by .* please report it"):
        _compare(model, frozen)


def test_explain_tells_of_a_frozen_model() -> None:
    told = t2t_fast.explain(t2t_fast.freeze(small("t2t_vit_7"), torch.float64), seeded_images(2, 32, 32))
    assert "linear" in told.backends()
