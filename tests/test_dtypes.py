"""Every model in every dtype, as a module and under autocast, against float64 on the same weights."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import TOLERANCES
from small_models import FAMILIES, MODELS, flat_gradients, relative_error, seeded_images, small
from torch import Tensor, nn

import t2t_fast

# Two blocks, three soft splits and a head may take a few times one op's tolerance: the largest error measured is 2.1 of
# it (gradients of images 10,000 times too bright), elsewhere 1.1.
FACTOR = 3

MODULE = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
AUTOCAST = [torch.bfloat16, torch.float16]
backends = pytest.mark.parametrize("backend", ["auto", "reference"])
every_family = pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)


def logits_and_gradients(
    model: nn.Module, images: Tensor, autocast: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        logits = model(images)
    logits.double().square().mean().backward()
    return logits.detach(), flat_gradients(model)


def check(got: tuple[Tensor, Tensor], model: nn.Module, images: Tensor, dtype: torch.dtype) -> None:
    """Compare with the reference backend in float64 on the very same weights and images."""
    with t2t_fast.use_backend("reference"):
        logits, grads = logits_and_gradients(copy.deepcopy(model).double(), images.double())
    assert torch.isfinite(got[0]).all()
    assert torch.isfinite(got[1]).all()
    assert relative_error(got[0], logits) < FACTOR * TOLERANCES[dtype].value
    assert relative_error(got[1], grads) < FACTOR * TOLERANCES[dtype].grad


@pytest.mark.parametrize("dtype", MODULE, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_module(name: str, dtype: torch.dtype) -> None:
    model, images = small(name).eval().to(dtype), seeded_images(3, 32, 32).to(dtype)
    got = logits_and_gradients(model, images)
    assert got[0].dtype == dtype
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {dtype}
    check(got, model, images, dtype)


@pytest.mark.parametrize("dtype", AUTOCAST, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_autocast(name: str, dtype: torch.dtype) -> None:
    model, images = small(name).eval(), seeded_images(3, 32, 32)
    got = logits_and_gradients(model, images, autocast=dtype)
    assert got[0].dtype == dtype
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    check(got, model, images, dtype)


@pytest.mark.parametrize("dtype", AUTOCAST, ids=str)
@every_family
def test_backward_inside_autocast(name: str, dtype: torch.dtype) -> None:
    model, images = small(name).eval(), seeded_images(3, 32, 32)
    with torch.autocast("cpu", dtype=dtype):
        got = logits_and_gradients(model, images, autocast=dtype)
    check(got, model, images, dtype)


@pytest.mark.parametrize("autocast", [False, True], ids=["module", "autocast"])
@pytest.mark.parametrize("dtype", AUTOCAST, ids=str)
@pytest.mark.parametrize("backend", ["aten", "reference"])
@every_family
def test_backends_on_odd_sizes(name: str, backend: str, dtype: torch.dtype, autocast: bool) -> None:
    model, images = small(name, img_size=(33, 47), backend=backend).eval(), seeded_images(2, 33, 47)
    if not autocast:
        model, images = model.to(dtype), images.to(dtype)
    got = logits_and_gradients(model, images, autocast=dtype if autocast else None)
    model.set_backend("auto")
    check(got, model, images, dtype)


@pytest.mark.parametrize("dtype", AUTOCAST, ids=str)
@every_family
def test_training_with_dropout(name: str, dtype: torch.dtype) -> None:
    model = small(name, drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.1).train().to(dtype)
    logits, grads = logits_and_gradients(model, seeded_images(5, 32, 32).to(dtype))
    assert torch.isfinite(logits).all()
    assert torch.isfinite(grads).all()
    assert grads.any()


@pytest.mark.parametrize("dtype", AUTOCAST, ids=str)
@every_family
def test_other_image_size(name: str, dtype: torch.dtype) -> None:
    model = small(name, dynamic_img_size=True).eval().to(dtype)
    images = seeded_images(2, 48, 33).to(dtype)
    assert model._tables == {}
    got = logits_and_gradients(model, images)
    assert {entry[2].dtype for entry in model._tables.values()} == {dtype}
    check(got, model, images, dtype)


@backends
@pytest.mark.parametrize("brightness", [1e2, 1e4])
@pytest.mark.parametrize("name", [FAMILIES["performer"], FAMILIES["transformer"]])
def test_bright_images_in_float16(name: str, brightness: float, backend: str) -> None:
    model, images = small(name).eval().half(), (brightness * seeded_images(2, 32, 32)).half()
    assert torch.isfinite(images).all()
    with t2t_fast.use_backend(backend):
        got = logits_and_gradients(model, images)
    check(got, model, images, torch.float16)


@backends
@pytest.mark.parametrize("autocast", [False, True], ids=["module", "autocast"])
@pytest.mark.parametrize("name", [FAMILIES["performer"], FAMILIES["transformer"], FAMILIES["se_mlp"]])
def test_large_tokens_in_float16(name: str, autocast: bool, backend: str) -> None:
    """Tokens of some thousands between the splits and in the backbone: the norms' statistics must not overflow."""
    model, images = small(name).eval(), seeded_images(2, 32, 32)
    with torch.no_grad():
        for layer in (model.tokens_to_token.attention1.mlp, model.tokens_to_token.attention2.mlp):
            last = layer[2] if isinstance(layer, nn.Sequential) else layer.fc2
            last.weight.mul_(2000)
        model.cls_token.mul_(2000)
    if not autocast:
        model, images = model.half(), images.half()
    with torch.autocast("cpu", dtype=torch.float16, enabled=autocast), t2t_fast.use_backend(backend):
        logits = model(images)
    assert torch.isfinite(logits).all()
    with t2t_fast.use_backend("reference"), torch.no_grad():
        want = copy.deepcopy(model).double()(images.double())
    assert relative_error(logits, want) < FACTOR * TOLERANCES[torch.float16].value
