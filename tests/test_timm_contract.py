"""What timm's and torch's tools ask of a model: factory arguments, default dtypes, resets, records of the input."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import timm
import torch
from small_models import FAMILIES, relative_error, seed_weights, seeded_images, small, smallest
from torch import Tensor, nn

import t2t_fast
from t2t_fast import T2TViT

every_family = pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)
sixteen_bits = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def fresh(name: str, **kwargs: Any) -> nn.Module:
    """Like ``smallest``, with the weights that the constructor draws."""
    arguments = {"img_size": 32, "num_classes": 5, "depth": 1, **kwargs}
    if name == "t2t_vit_dense":
        arguments |= {"depth": 2, "block_config": (1, 1)}
    return timm.create_model(name, **arguments)


@pytest.fixture
def default_dtype() -> Iterator[None]:
    """Puts torch's default dtype back."""
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@every_family
def test_factory_arguments_place_every_tensor(name: str) -> None:
    model = fresh(name, device="meta", dtype=torch.float64)
    assert {(t.device.type, t.dtype) for t in tensors(model).values()} == {("meta", torch.float64)}
    torch.manual_seed(0)
    want = fresh(name).state_dict()
    torch.manual_seed(0)
    got = fresh(name, device="cpu", dtype=torch.float32).state_dict()
    assert all(torch.equal(got[key], value) for key, value in want.items())


@every_family
@sixteen_bits
def test_built_in_sixteen_bits(name: str, dtype: torch.dtype, default_dtype: None) -> None:
    """By the argument or by torch's default, with weights like a float32 model's: no outlier, no other dtype."""
    images, want = seeded_images(2, 32, 32), smallest(name).eval()
    by_argument = fresh(name, dtype=dtype)
    torch.set_default_dtype(dtype)
    by_default = fresh(name)
    for model in (by_argument, by_default):
        assert {t.dtype for t in tensors(model).values()} == {dtype}
        linears = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
        assert (
            max(weight.abs().max().item() for weight in linears) < 0.13
        )  # the bound is six standard deviations of 0.02, rounded
        got = seed_weights(model, seed=1).eval()(images.to(dtype))
        assert got.dtype == dtype
        torch.set_default_dtype(torch.float32)
        assert relative_error(got, want(images)) < 0.05


@every_family
def test_init_weights_after_to_empty_gives_what_a_new_model_has(name: str) -> None:
    torch.manual_seed(3)
    want = fresh(name).state_dict()
    model = fresh(name, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in tensors(model).values():
            tensor.fill_(float("nan"))
    torch.manual_seed(3)
    model.init_weights()
    got = model.state_dict()
    assert [key for key, value in want.items() if not torch.equal(got[key], value)] == []
    assert [key for key, p in model.named_parameters() if not p.requires_grad] == [
        key for key, p in fresh(name).named_parameters() if not p.requires_grad
    ]


@every_family
def test_every_module_can_reset_its_own_parameters(name: str) -> None:
    """What FSDP asks for: each module that owns parameters has ``reset_parameters``."""
    model = fresh(name, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.reset_parameters()
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_reset_classifier_keeps_mode_device_and_dtype(training: bool) -> None:
    model = small("t2t_vit_7").to(torch.float64).train(training)
    model.reset_classifier(np.int64(3))
    assert type(model.num_classes) is int
    assert [module.training for module in model.modules()] == [training] * len(list(model.modules()))
    assert model.head.weight.dtype == torch.float64
    assert model(seeded_images(2, 32, 32).double()).shape == (2, 3)
    model.reset_classifier(0)
    assert not any(module.training != training for module in model.modules())


def test_a_refused_reset_changes_nothing() -> None:
    model = small("t2t_vit_7")
    head = model.head
    for arguments, error in (((-1,), ValueError), ((2.5,), TypeError), ((True,), TypeError), ((3, "max"), ValueError)):
        with pytest.raises(error, match=r"num_classes|global_pool"):
            model.reset_classifier(*arguments)
        assert (model.head, model.num_classes, model.global_pool) == (head, 5, "token")


def test_set_input_size_takes_what_timm_passes() -> None:
    model, images = small("t2t_vit_7").eval(), seeded_images(2, 32, 32)
    want = model(images)
    model.set_input_size()
    model.set_input_size(patch_size=(16, 16))
    assert torch.equal(model(images), want)
    model.set_input_size(img_size=np.int64(48), patch_size=16)
    assert model.img_size == (48, 48)
    with pytest.raises(ValueError, match=r"patch_size must be 16, .* got 8"):
        model.set_input_size(64, patch_size=8)
    assert model.img_size == (48, 48)


def test_timm_knows_the_input_after_a_change() -> None:
    timm_models = pytest.importorskip("timm.models")
    if not hasattr(timm_models, "get_model_traits"):
        pytest.skip(f"timm {timm.__version__} keeps no record of the input")
    model = small("t2t_vit_7", in_chans=4)
    model.set_input_size((48, 64))
    model.reset_classifier(7)
    traits = timm_models.get_model_traits(model)
    assert (traits["img_size"], traits["in_chans"], traits["num_classes"]) == ((48, 64), 4, 7)
    assert timm_models.get_model_args(model)["img_size"] == (48, 64)


@pytest.mark.parametrize("index", [int, np.int64, np.uint8, torch.tensor])
def test_counts_and_sizes_with_an_index_become_plain_ints(index: Any) -> None:
    model = T2TViT(
        img_size=(index(32), index(48)),
        in_chans=index(4),
        num_classes=index(10),
        embed_dim=index(32),
        depth=index(2),
        num_heads=index(2),
        token_dim=index(16),
        mlp_ratio=np.float32(2),
        qk_scale=Fraction(1, 2),
        drop_rate=np.float64(0.25),
    )
    kept = (*model.img_size, model.in_chans, model.num_classes, model.embed_dim, model.blocks[0].attn.num_heads)
    assert kept == (32, 48, 4, 10, 32, 2)
    assert {type(number) for number in kept} == {int}
    assert (model.blocks[0].attn.scale, model.pos_drop.p) == (0.5, 0.25)
    assert model.eval()(torch.zeros(1, 4, 32, 48)).shape == (1, 10)


def test_norms_by_name() -> None:
    plain, named = small("t2t_vit_7").eval(), small("t2t_vit_7", norm_layer="layernorm").eval()
    images = seeded_images(2, 32, 32)
    assert type(named.norm) is nn.LayerNorm
    assert torch.equal(named(images), plain(images))
    other = small("t2t_vit_7", norm_layer="rmsnorm")
    assert isinstance(other.norm, timm.layers.RmsNorm)
    assert other(images).shape == (2, 5)
    with pytest.raises(ValueError, match="norm_layer='nonsense' is no name that"):
        small("t2t_vit_7", norm_layer="nonsense")
    with pytest.raises(TypeError, match="norm_layer must be a callable or a name, got 3"):
        small("t2t_vit_7", norm_layer=3)


def _logits(model: nn.Module, images: np.ndarray) -> np.ndarray:
    """For another process."""
    with torch.no_grad():
        return model(torch.from_numpy(images)).numpy()


def test_a_spawned_process_runs_models_after_threaded_work() -> None:
    model, images = smallest("t2t_vit_7").eval(), seeded_images(8, 32, 32).numpy()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for each in (model, t2t_fast.freeze(model)):
            want = _logits(each, images)  # with torch's threads
            got = pool.submit(_logits, each, images).result(timeout=120)
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_scripting_says_what_to_do_instead() -> None:
    for model in (smallest("t2t_vit_7"), nn.Sequential(smallest("t2t_vit_7"))):
        with pytest.raises(RuntimeError, match=r"jit\.script .*T2TViT.*jit\.trace"):
            torch.jit.script(model)
