"""t2t_fast.optimize: models of other projects taken over, with the same results, parameters, modes and rates.

The models are stand-ins (``doubles.py``) with the structure of the official code's and mmpretrain's.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from doubles import T2T_ViT, randomize
from doubles_mmpretrain import ImageClassifier, MMPretrainT2TViT
from timm.layers import DropPath
from torch import Tensor, nn

import t2t_fast
from t2t_fast.models.layouts import official_name
from t2t_fast.models.variants import VARIANTS

SHAPES: dict[str, dict[str, list[int]]] = json.loads(
    (Path(__file__).parent / "golden" / "state_dict_shapes.json").read_text()
)

MODELS: dict[str, Callable[..., nn.Module]] = {
    "performer": T2T_ViT,
    "transformer": lambda **kwargs: T2T_ViT(tokens_type="transformer", **kwargs),
    "convolution": lambda **kwargs: T2T_ViT(tokens_type="convolution", **kwargs),
    "many heads": lambda **kwargs: T2T_ViT(num_heads=16, **kwargs),
    "se": lambda **kwargs: T2T_ViT(block_type="se", **kwargs),
    "ghost": lambda **kwargs: T2T_ViT(block_type="ghost", **kwargs),
    "dense": lambda **kwargs: T2T_ViT(block_type="dense", depth=3, block_config=(1, 2), **kwargs),
    "mmpretrain": ImageClassifier,
}

# Relative norm of the error, of logits and of each gradient, against the stand-in in float64. Its weights are rounded.
TOLERANCES = {
    torch.float64: (1e-13, 1e-11),
    torch.float32: (5e-6, 2e-5),
    torch.bfloat16: (4e-2, None),
    torch.float16: (6e-3, None),
}


@pytest.fixture(params=MODELS)
def theirs(request: pytest.FixtureRequest) -> nn.Module:
    return randomize(MODELS[request.param]()).eval()


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@torch.no_grad()
def assert_same_logits(ours: nn.Module, theirs: nn.Module, images: Tensor | None = None) -> None:
    """Equal up to rounding in the dtype of the models."""
    images = torch.randn(3, 3, 64, 64) if images is None else images
    dtype = next(theirs.parameters()).dtype
    got, want = ours(images.to(dtype)), copy.deepcopy(theirs).double()(images.to(dtype).double())
    assert got.dtype == dtype
    assert error(got, want) < TOLERANCES[dtype][0]


# Same results


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_logits(theirs: nn.Module, dtype: torch.dtype) -> None:
    theirs.to(dtype)
    ours = t2t_fast.optimize(theirs)
    assert {parameter.dtype for parameter in ours.parameters()} == {dtype}
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_gradients(theirs: nn.Module, dtype: torch.dtype, training: bool) -> None:
    for module in theirs.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    theirs.to(dtype).train(training)
    ours = t2t_fast.optimize(theirs)
    shared = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    images, weights = torch.randn(3, 3, 64, 64, dtype=dtype), torch.randn(3, 10, dtype=dtype)
    want = torch.autograd.grad((theirs(images) * weights).sum(), shared)
    got = torch.autograd.grad((ours(images) * weights).sum(), shared)
    tolerance = TOLERANCES[dtype][1]
    assert tolerance is not None
    for mine, exact in zip(got, want, strict=True):
        assert exact.norm() > 0
        assert error(mine, exact) < tolerance


@pytest.mark.parametrize("backend", ["reference", "aten"])
def test_backend(backend: str) -> None:
    theirs = randomize(T2T_ViT()).eval()
    ours = t2t_fast.optimize(theirs, backend=backend)
    assert t2t_fast.explain(ours, torch.randn(1, 3, 64, 64)).backends()["soft_split_linear"] == {backend}
    assert_same_logits(ours, theirs)
    with pytest.raises(TypeError, match="backend='fast' is unknown"):
        t2t_fast.optimize(theirs, backend="fast")


@pytest.mark.parametrize(
    "kwargs",
    [
        {"embed_dim": 48, "depth": 5, "num_heads": 4, "token_dim": 32},
        {"embed_dim": 49, "depth": 1, "num_heads": 7, "mlp_ratio": 1.03},  # a hidden width that no float ratio hits
        {"img_size": 96, "in_chans": 1, "qkv_bias": True},
        {"num_classes": 0},
        {"tokens_type": "transformer", "in_chans": 4, "token_dim": 48, "num_classes": 2},
        {"block_type": "dense", "depth": 4, "block_config": (2, 1, 1), "growth_rate": 12, "num_heads": 2},
    ],
)
def test_custom_designs(kwargs: dict[str, Any]) -> None:
    theirs = randomize(T2T_ViT(**kwargs)).eval()
    size = kwargs.get("img_size", 64)
    images = torch.randn(2, kwargs.get("in_chans", 3), size, size)
    ours = t2t_fast.optimize(theirs)
    assert ours.num_classes == kwargs.get("num_classes", 10)
    assert_same_logits(ours, theirs, images)


def test_every_hidden_width() -> None:
    """Also those that the width times their ratio to it misses, rounded down."""
    missed = [hidden for hidden in range(1, 400) if int(49 * (hidden / 49)) != hidden]
    assert missed
    for hidden in missed:
        with torch.device("meta"):
            theirs = T2T_ViT(embed_dim=49, num_heads=7, depth=1)
            theirs.blocks[0].mlp.fc1, theirs.blocks[0].mlp.fc2 = nn.Linear(49, hidden), nn.Linear(hidden, 49)
        assert t2t_fast.optimize(theirs).blocks[0].mlp.fc1.out_features == hidden


def test_fine_tuned() -> None:
    theirs = randomize(T2T_ViT(num_classes=1000)).train()
    theirs.head = nn.Linear(32, 10)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.05)
    images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 3, 3, 9])
    for _ in range(3):
        loss = nn.functional.cross_entropy(theirs(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ours = t2t_fast.optimize(theirs.eval())
    assert (ours.num_classes, ours.head.out_features) == (10, 10)
    assert_same_logits(ours, theirs)


# Same parameters


def test_parameters_are_shared(theirs: nn.Module) -> None:
    ours = t2t_fast.optimize(theirs)
    layout = "mmpretrain" if isinstance(theirs, ImageClassifier) else "official"
    given = {official_name(name, layout): value for name, value in theirs.named_parameters()}
    own = dict(ours.named_parameters())
    assert own.keys() - given.keys() == ({"pos_embed"} if layout == "mmpretrain" else set())
    for name, parameter in given.items():
        assert own[name] is parameter, name
    if layout == "mmpretrain":
        assert own["pos_embed"].data_ptr() == theirs.backbone.pos_embed.data_ptr()
        assert not own["pos_embed"].requires_grad


def test_training_one_trains_the_other(theirs: nn.Module) -> None:
    ours = t2t_fast.optimize(theirs)
    images = torch.randn(3, 3, 64, 64)
    for trained, other in ((theirs, ours), (ours, theirs)):
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
        with torch.no_grad():
            before = other(images)
        trained(images).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            assert error(other(images), before) > 1e-4
        assert_same_logits(ours, theirs, images)


def test_frozen_parameters_stay_frozen() -> None:
    theirs = T2T_ViT()
    theirs.tokens_to_token.requires_grad_(False)
    ours = t2t_fast.optimize(theirs)
    assert [p.requires_grad for p in ours.parameters()] == [
        not name.startswith("tokens_to_token") and name != "pos_embed" for name, _ in ours.named_parameters()
    ]


def test_state_dict(theirs: nn.Module) -> None:
    ours = t2t_fast.optimize(theirs)
    state_dict = ours.state_dict()
    if isinstance(theirs, T2T_ViT):
        assert state_dict.keys() == theirs.state_dict().keys()
        again = randomize(copy.deepcopy(theirs), seed=1)
        again.load_state_dict(state_dict)
        assert_same_logits(ours, again)
    else:
        assert {"head.weight", "pos_embed", "blocks.1.mlp.fc2.bias"} <= state_dict.keys()
    again = randomize(t2t_fast.optimize(copy.deepcopy(theirs)), seed=1)
    t2t_fast.load_checkpoint(theirs.state_dict(), again)  # in their names as well
    assert_same_logits(again, theirs)


@pytest.mark.parametrize("name", SHAPES)
def test_released_designs(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """At full size; this also shows that the stand-ins have the original's parameters."""
    with torch.device("meta"):
        theirs = T2T_ViT(img_size=224, num_classes=1000, **VARIANTS[name].kwargs)
        own = t2t_fast.create_model(name)
    ours = t2t_fast.optimize(theirs)
    for model in (theirs, ours):
        assert {key: list(value.shape) for key, value in model.state_dict().items()} == SHAPES[name]
    assert str(ours) == str(own)
    assert type(ours) is type(own)
    assert (ours.img_size, ours.num_classes) == ((224, 224), 1000)
    assert not caplog.records


# Same settings


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_device(theirs: nn.Module, device: str) -> None:
    ours = t2t_fast.optimize(theirs.to(device))
    assert {parameter.device.type for parameter in ours.parameters()} == {device}
    assert ours(torch.zeros(2, 3, 64, 64, device=device)).device.type == device


@pytest.mark.parametrize("training", [False, True])
def test_training_mode(theirs: nn.Module, training: bool) -> None:
    ours = t2t_fast.optimize(theirs.train(training))
    assert {module.training for module in ours.modules()} == {training}


def test_mode_of_parts() -> None:
    official, classifier = T2T_ViT(), ImageClassifier()
    official.tokens_to_token.eval()
    official.blocks[0].eval()
    classifier.backbone.tokens_to_token.eval()
    classifier.backbone.encoder[0].eval()
    for theirs in (official, classifier):
        ours = t2t_fast.optimize(theirs)
        assert ours.training
        for frozen in (ours.tokens_to_token, ours.blocks[0]):
            assert not any(module.training for module in frozen.modules())
        for trained in (ours.blocks[1], ours.head, ours.norm, ours.pos_drop):
            assert all(module.training for module in trained.modules())


def dropouts(model: nn.Module) -> dict[str, float]:
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    rates.update({name: module.drop_prob for name, module in model.named_modules() if isinstance(module, DropPath)})
    return {name: rate for name, rate in rates.items() if rate}


@pytest.mark.parametrize("block_type", ["standard", "se", "ghost"])
def test_dropouts(block_type: str) -> None:
    rates: dict[str, Any] = {"drop_rate": 0.2, "attn_drop_rate": 0.3, "drop_path_rate": 0.4}
    theirs = T2T_ViT(depth=3, block_type=block_type, **rates)
    theirs.blocks[1].drop_path.drop_prob = 0.45
    theirs.tokens_to_token.attention2.dp.p = 0.15
    given = dropouts(theirs)
    assert given["tokens_to_token.attention1.mlp.3"] == 0.1
    if block_type != "ghost":  # timm's Mlp has two modules
        for i in range(3):
            rate = given.pop(f"blocks.{i}.mlp.drop")
            given.update({f"blocks.{i}.mlp.drop1": rate, f"blocks.{i}.mlp.drop2": rate})
    assert dropouts(t2t_fast.optimize(theirs)) == given


@pytest.mark.parametrize("divides", [False, True])
def test_mmpretrain_dropouts(divides: bool) -> None:
    rates: dict[str, Any] = {"drop_rate": 0.2, "attn_drop_rate": 0.3, "drop_path_rate": 0.4}
    wanted = {"pos_drop": 0.2, "blocks.1.drop_path": 0.4}
    for i in range(2):
        wanted.update({f"blocks.{i}.attn.attn_drop": 0.3, f"blocks.{i}.attn.proj_drop": 0.2})
        wanted.update({f"blocks.{i}.mlp.drop1": 0.2, f"blocks.{i}.mlp.drop2": 0.2})
    assert dropouts(t2t_fast.optimize(ImageClassifier(divides=divides, **rates))) == wanted


def test_norms_and_epsilons(theirs: nn.Module) -> None:
    for i, module in enumerate(theirs.modules()):
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.01 * (1 + i % 7)
        if hasattr(module, "epsilon"):
            module.epsilon = 1e-3
    assert_same_logits(t2t_fast.optimize(theirs.double()), theirs)


@pytest.mark.parametrize("qk_scale", [32**-0.5, 1])
@pytest.mark.parametrize("block_type", ["standard", "ghost", "dense"])
def test_qk_scale(block_type: str, qk_scale: float, caplog: pytest.LogCaptureFixture) -> None:
    """The official factory sets ``embed_dim**-0.5`` where pretrained weights are asked for."""
    theirs = randomize(T2T_ViT(qk_scale=qk_scale, block_type=block_type)).eval()
    ours = t2t_fast.optimize(theirs)
    assert_same_logits(ours, theirs)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("t2t_fast", logging.WARNING)
    assert f"qk_scale is {qk_scale:.6g} (blocks.0.attn), kept as it is" in record.message
    assert "head_dim**-0.5 = 0.25" in record.message


def test_token_layer_scale(caplog: pytest.LogCaptureFixture) -> None:
    theirs = randomize(T2T_ViT(tokens_type="transformer")).eval()
    theirs.tokens_to_token.attention1.attn.scale = 0.5
    theirs.blocks[1].attn.scale = 0.5
    assert_same_logits(t2t_fast.optimize(theirs), theirs)
    assert ["(blocks.1.attn)" in record.message for record in caplog.records] == [True]


# mmpretrain


def test_mmpretrain_that_divides_by_the_scale(caplog: pytest.LogCaptureFixture) -> None:
    right, divides = (randomize(ImageClassifier(divides=divides)).eval() for divides in (False, True))
    assert_same_logits(t2t_fast.optimize(right), right)
    assert not caplog.records
    ours = t2t_fast.optimize(divides)
    assert_same_logits(ours, right)
    images = torch.randn(2, 3, 64, 64)
    assert error(ours(images), divides(images)) > 0.01
    (record,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert record.name == "t2t_fast"
    assert "divides attention scores by the scale (since 1.0.0rc7)" in record.message


@pytest.mark.parametrize("out_type", ["cls_token", "avg_featmap"])
def test_mmpretrain_backbone(out_type: str) -> None:
    theirs = randomize(MMPretrainT2TViT(out_type=out_type)).eval()
    ours = t2t_fast.optimize(theirs)
    images = torch.randn(2, 3, 64, 64)
    assert ours.num_classes == 0
    assert error(ours(images), theirs(images)[0]) < 5e-6


def test_mmpretrain_takes_images_of_any_size() -> None:
    theirs = randomize(ImageClassifier()).eval()
    ours = t2t_fast.optimize(theirs)
    for size in ((64, 64), (96, 64), (80, 160), (70, 77), (64, 64)):
        assert_same_logits(ours, theirs, torch.randn(2, 3, *size))


# What is accepted


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.compile, lambda model: nn.DataParallel(torch.compile(model))], ids=range(3)
)
def test_wrapped(theirs: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> None:
    ours = t2t_fast.optimize(wrap(theirs))
    assert_same_logits(ours, theirs)
    assert t2t_fast.optimize(wrap(ours)) is ours


def test_compiled_blocks() -> None:
    theirs = randomize(T2T_ViT(drop_path_rate=0.2)).eval()
    plain = copy.deepcopy(theirs)
    theirs.blocks[1] = torch.compile(theirs.blocks[1])
    ours = t2t_fast.optimize(theirs)
    assert_same_logits(ours, plain)
    assert dropouts(ours)["blocks.1.drop_path"] == 0.2


@pytest.mark.parametrize("name", ["t2t_vit_7", "t2t_vit_dense"])
def test_ours_is_returned_as_it_is(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert t2t_fast.optimize(model) is model


def changed(change: Callable[[Any], object], **kwargs: Any) -> nn.Module:
    model = T2T_ViT(**kwargs)
    change(model)
    return model


def set_attribute(path: str, value: object) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, value)

    return change


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: "t2t_vit_14", "got 't2t_vit_14' of type str, which is no torch.nn.Module"),
        (lambda: T2T_ViT, "of type type, which is no torch.nn.Module"),
        (lambda: None, "got None"),
        (lambda: nn.Linear(3, 3), "got Linear, which holds no T2T-ViT: found weight, bias; missing cls_token"),
        (lambda: timm.create_model("resnet18"), "got ResNet, which holds no T2T-ViT: found conv1.weight"),
        (lambda: nn.DataParallel(timm.create_model("deit_tiny_patch16_224")), "got VisionTransformer, which holds no"),
        (
            lambda: changed(lambda m: m.add_module("extra", nn.Linear(32, 32))),
            "got T2T_ViT, which looks like one, but none that can be taken over: .*2 unexpected: extra.weight, extra.b",
        ),
        (
            lambda: changed(lambda m: m.blocks[1].add_module("norm3", nn.LayerNorm(32))),
            "2 unexpected: blocks.1.norm3.weight",
        ),
        (lambda: changed(lambda m: setattr(m, "norm", nn.Identity())), "2 missing: norm.weight, norm.bias"),
        (
            lambda: changed(set_attribute("tokens_to_token.project", nn.Linear(576, 40))),
            r"1 of another shape: .*|of another shape: tokens_to_token.project.weight \(40, 576\) for \(32, 576\)",
        ),
        (
            lambda: nn.ModuleDict({"backbone": T2T_ViT(), "model": T2T_ViT()}),
            "state_dict holds 'cls_token' twice",
        ),
        (
            lambda: changed(set_attribute("tokens_to_token.soft_split0", nn.Unfold(7, stride=2, padding=2))),
            r"soft_split0 has \(kernel size, stride, padding\) \(7, 2, 2\) instead of \(7, 4, 2\)",
        ),
        (
            lambda: changed(set_attribute("tokens_to_token.project.padding", (0, 0)), tokens_type="convolution"),
            r"project has \(kernel size, stride, padding\) \(3, 2, 0\) instead of \(3, 2, 1\)",
        ),
        (lambda: changed(set_attribute("blocks.1.mlp.act", nn.ReLU())), r"blocks.1.mlp.act must be an exact GELU, got"),
        (lambda: changed(set_attribute("tokens_to_token.attention1.mlp.1", nn.GELU("tanh"))), "approximate='tanh'"),
        (lambda: changed(set_attribute("blocks.1.attn.num_heads", 4)), "one number of attention heads"),
        (lambda: changed(lambda m: delattr(m.blocks[0].attn, "num_heads")), "one number of attention heads"),
        (lambda: changed(lambda m: delattr(m.blocks[0], "attn")), "one number of attention heads"),
        (lambda: changed(lambda m: delattr(m, "pos_embed")), "no position table"),
        (
            lambda: changed(set_attribute("pos_embed", nn.Parameter(torch.zeros(1, 13, 32), requires_grad=False))),
            "no position table .* of a square grid",
        ),
        (
            lambda: changed(set_attribute("tokens_to_token.attention2.attn.num_heads", 2), tokens_type="transformer"),
            "attention2 has more than one head",
        ),
        (
            lambda: changed(
                set_attribute("tokens_to_token.attention1.attn.attn_drop.p", 0.1), tokens_type="transformer"
            ),
            "attention1 has a dropout",
        ),
        (lambda: changed(set_attribute("blocks.0.attn.num_heads", 5), depth=1), "num_heads=5 must divide"),
        (lambda: ImageClassifier(with_cls_token=False), "drops the cls token"),
        (lambda: MMPretrainT2TViT(with_cls_token=False), "drops the cls token"),
    ],
)
def test_other_models_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message) as exc_info:
        t2t_fast.optimize(make())
    assert str(exc_info.value).startswith(
        "model must be a T2T-ViT of the official code (class T2T_ViT) or of mmpretrain (backbone T2T_ViT), got "
    )
