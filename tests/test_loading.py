"""Loading: ``load_state_dict`` means what torch means; ``load_checkpoint`` fits, and tells what it changed."""

from __future__ import annotations

import copy
import io
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from weights import assert_same, small

import t2t_fast
from t2t_fast.cli import main
from t2t_fast.models.checkpoints import (
    CheckpointError,
    adapt_state_dict,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from t2t_fast.models.layouts import LAYOUTS, from_official
from t2t_fast.models.pos_embed import resize_table


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
def test_every_layout_loads(tmp_path: Path, layout: str, suffix: str) -> None:
    source = small(seed=0)
    path = tmp_path / f"w{suffix}"
    save_checkpoint(source.state_dict(), path, layout)
    assert read_checkpoint(path).layout == layout
    assert_same(load_checkpoint(path), source.state_dict())
    if suffix != ".npz":
        state_dict = torch.load(path)["state_dict"] if suffix == ".pth" else safetensors.torch.load_file(path)
        assert set(state_dict) == set(from_official(source.state_dict(), layout))

    loaded = small()
    load_checkpoint(path, loaded)
    assert_same(loaded.state_dict(), source.state_dict())
    fitted = small(num_classes=3, img_size=(32, 64), in_chans=1)
    wanted, _ = adapt_state_dict(source.state_dict(), fitted)
    load_checkpoint(path, fitted)
    assert_same(fitted.state_dict(), wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
def test_checkpoint_path_of_timm(tmp_path: Path, layout: str, suffix: str) -> None:
    """timm hands archives of NumPy to the model, which reads any layout; everything else goes to load_state_dict."""
    source = small(seed=0)
    path = tmp_path / f"w{suffix}"
    weights = from_official(source.state_dict(), layout)
    if suffix == ".pth":
        torch.save({"state_dict": weights, "epoch": 3}, path)
    else:
        save_checkpoint(source.state_dict(), path, layout)
    kwargs = {"tokens_type": "transformer", "embed_dim": 32, "depth": 1, "num_heads": 2, "checkpoint_path": str(path)}
    if suffix == ".npz" or layout == "official":
        through_timm = timm.create_model("t2t_vit_7", num_classes=10, img_size=32, **kwargs)
        assert_same(through_timm.state_dict(), source.state_dict())
    else:
        with pytest.raises(RuntimeError, match=r"Missing key\(s\)"):
            timm.create_model("t2t_vit_7", num_classes=10, img_size=32, **kwargs)


def test_a_square_table_is_resized_to_a_grid_of_as_many_tokens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    square = small(img_size=64)  # 4 x 4 tokens, as 2 x 8
    save_checkpoint(square.state_dict(), tmp_path / "square.pth")
    wide = small(img_size=(32, 128))
    load_checkpoint(tmp_path / "square.pth", wide)
    assert "resized pos_embed from 4x4 to 2x8 tokens" in caplog.text
    want = resize_table(square.pos_embed, (4, 4), (2, 8))
    assert not torch.equal(want, square.pos_embed)
    assert torch.equal(wide.pos_embed, want)
    save_checkpoint(wide.state_dict(), tmp_path / "wide.pth")  # and a wide one stays as it is
    assert torch.equal(load_checkpoint(tmp_path / "wide.pth", small(img_size=(32, 128)))["pos_embed"], want)


def test_models_that_look_alike_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = t2t_fast.create_model("t2t_vit_14_resnext", img_size=32, num_classes=2)
    save_checkpoint(source.state_dict(), tmp_path / "w.pth")
    t2t_fast.create_model(checkpoint=tmp_path / "w.pth")
    assert re.search("taken for t2t_vit_14, .*t2t_vit_14_resnext .*same names", caplog.text)


def test_a_head_that_cannot_be_kept_is_missing() -> None:
    weights = small(num_classes=10).state_dict()
    with torch.device("meta"):
        model = small(num_classes=3)
    with pytest.raises(RuntimeError, match=r"head\.weight"):
        model.load_state_dict(weights, assign=True)


def test_create_model_reads_the_architecture_off_the_weights(tmp_path: Path) -> None:
    source = t2t_fast.create_model("t2t_vit_10", num_classes=3, img_size=32, in_chans=2)
    save_checkpoint(source.state_dict(), tmp_path / "w.npz", "paddlevit")
    assert_same(t2t_fast.create_model(checkpoint=tmp_path / "w.npz").state_dict(), source.state_dict())


def test_load_logs_what_it_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "w.pth"
    source = small(seed=0).state_dict()
    torch.save({"state_dict": source, "state_dict_ema": source}, path)
    caplog.set_level(logging.INFO, "t2t_fast")
    adapted = load_checkpoint(path, small(num_classes=3, img_size=64))
    assert adapted["pos_embed"].shape == (1, 17, 32)
    assert [(record.levelname, record.name) for record in caplog.records] == [
        ("INFO", "t2t_fast"),
        ("WARNING", "t2t_fast"),
        ("WARNING", "t2t_fast"),
    ]
    assert str(path) in caplog.text and "resized pos_embed from 2x2 to 4x4" in caplog.text


def test_weights_of_another_model_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    save_checkpoint(small(depth=2).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"do not fit the model .*11 unexpected: blocks\.1\.") as caught:
        load_checkpoint(path, small())
    assert "\n" not in str(caught.value)
    load_checkpoint(path, small(), strict=False)
    with pytest.raises(CheckpointError, match=r"of another shape: cls_token \(1, 1, 32\) for"):
        load_checkpoint(path, small(embed_dim=64, depth=2), strict=False)
    save_checkpoint(dict(small(img_size=(160, 320)).state_dict()), path)  # a plain dict does not tell the grid
    with pytest.raises(CheckpointError, match=r"w\.pth: pos_embed has 200 tokens"):
        load_checkpoint(path, small())


# load_state_dict means what torch means


def replace_head(model: Any, kind: str) -> nn.Module:
    """Give a narrow model of width 32 another head, as people do, or wrap a part of it."""
    if kind == "mlp":
        model.head = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 5))
    elif kind == "dropout":
        model.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(32, 5))
    elif kind == "weight-normed":
        parametrizations.weight_norm(model.head)
    elif kind == "multi-head":
        model.head = nn.ModuleDict({"weight": nn.Linear(32, 3), "bias": nn.Linear(32, 2)})
    elif kind == "batch-normed":
        model.head = nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 5))
    elif kind == "compiled head":
        model.head = torch.compile(model.head)
    elif kind == "compiled block":
        model.blocks[0] = torch.compile(model.blocks[0])
    elif kind == "named backbone":
        model.backbone = nn.Linear(4, 4)
        model.model = nn.Linear(4, 4)
    elif kind == "wrapped":
        return nn.ModuleDict({"model": model, "criterion": nn.Linear(2, 2)})
    elif kind == "averaged":
        return torch.optim.swa_utils.AveragedModel(model)
    elif kind == "non-square":
        return small(img_size=(32, 128))
    elif kind == "quantised":
        model.blocks[0].mlp.fc1 = QuantisedLinear(model.blocks[0].mlp.fc1)
    return model


class QuantisedLinear(nn.Module):
    """Keeps its weight in int8, with a scale of another name, as quantisers do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


KINDS = [
    "plain",
    "mlp",
    "dropout",
    "weight-normed",
    "multi-head",
    "batch-normed",
    "compiled head",
    "compiled block",
    "named backbone",
    "wrapped",
    "averaged",
    "non-square",
    "quantised",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by", ["state_dict", "file"])
def test_a_model_loads_its_own_state(tmp_path: Path, kind: str, by: str) -> None:
    """Whatever has become of the model: every tensor afterwards is the one that was saved."""
    model = replace_head(small(seed=0), kind)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    other = replace_head(small(seed=1), kind)
    assert any(not torch.equal(saved[name], value) for name, value in other.state_dict().items())
    if by == "state_dict":
        result = other.load_state_dict(copy.deepcopy(model.state_dict()))
        assert not result.missing_keys and not result.unexpected_keys
    else:
        torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "w.pth")
        load_checkpoint(tmp_path / "w.pth", other)
    assert_same(other.state_dict(), saved)


def test_load_state_dict_of_an_average(tmp_path: Path) -> None:
    model = replace_head(small(seed=0), "dropout")
    average, other = ModelEmaV3(model), ModelEmaV3(replace_head(small(seed=1), "dropout"))
    buffer = io.BytesIO()
    torch.save(average.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer))
    assert_same(other.module.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 4}, r"size mismatch for head\.weight"),
        ({"num_classes": 0}, r"Unexpected key\(s\).*head\.weight"),
        ({"img_size": 64}, r"size mismatch for pos_embed"),
        ({"in_chans": 1}, r"size mismatch for tokens_to_token"),
    ],
)
def test_load_state_dict_changes_nothing(change: dict[str, Any], message: str) -> None:
    """Under strict loading nothing is dropped, kept or resized without an error."""
    with pytest.raises(RuntimeError, match=message):
        small(**change).load_state_dict(small(seed=0).state_dict())


def test_load_state_dict_translates_nothing() -> None:
    weights = small(seed=0).state_dict()
    for foreign in (from_official(weights, "mmpretrain"), {f"module.{k}": v for k, v in weights.items()}):
        with pytest.raises(RuntimeError, match=r"Unexpected key\(s\)"):
            small().load_state_dict(foreign)
    result = small().load_state_dict(from_official(weights, "mmpretrain"), strict=False)
    assert len(result.missing_keys) == len(result.unexpected_keys) == len(weights)


def test_quantised_dynamically() -> None:
    """torch's own dynamic quantisation keeps weights in tuples, beside dtypes: all of it loads, by either way."""
    torch.backends.quantized.engine = "onednn" if "onednn" in torch.backends.quantized.supported_engines else "fbgemm"

    def quantised(seed: int) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch will leave it to torchao
            return torch.ao.quantization.quantize_dynamic(small(seed=seed), {nn.Linear}, dtype=torch.qint8)

    model, by_state, by_file = quantised(0), quantised(1), quantised(2)
    state = copy.deepcopy(model.state_dict())
    by_state.load_state_dict(state)
    load_checkpoint({"model": state}, by_file)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(by_state(images), model(images))
    assert torch.equal(by_file(images), model(images))


# load_checkpoint fits


@pytest.mark.parametrize("kind", ["mlp", "dropout", "weight-normed", "multi-head", "batch-normed", "compiled head"])
def test_another_head_is_kept_whole(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    source = small(seed=0)
    save_checkpoint(source.state_dict(), tmp_path / "w.pth")
    model = replace_head(small(seed=1, num_classes=5), kind)
    before = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("head.")}
    load_checkpoint(tmp_path / "w.pth", model)
    after = model.state_dict()
    assert_same({name: after[name] for name in before}, before)
    assert torch.equal(after["blocks.0.mlp.fc1.weight"], source.state_dict()["blocks.0.mlp.fc1.weight"])
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "the model keeps its own" in record.getMessage()


@pytest.mark.parametrize("wrap", ["compiled block", "compiled model", "data parallel"])
def test_wrapped_models_are_fitted(tmp_path: Path, wrap: str) -> None:
    source = small(seed=0)
    save_checkpoint(source.state_dict(), tmp_path / "w.pth")
    inner = small(seed=1, num_classes=3)
    model: nn.Module = inner
    if wrap == "compiled block":
        inner.blocks[0] = torch.compile(inner.blocks[0])
    else:
        model = torch.compile(inner) if wrap == "compiled model" else nn.DataParallel(inner)
    load_checkpoint(tmp_path / "w.pth", model)
    loaded = {name.replace("_orig_mod.", ""): value for name, value in inner.state_dict().items()}
    for name, value in source.state_dict().items():
        assert name.startswith("head.") or torch.equal(loaded[name], value), name


def test_a_frozen_model_takes_only_its_own_state(tmp_path: Path) -> None:
    model = small(seed=0)
    save_checkpoint(model.state_dict(), tmp_path / "w.pth")
    with pytest.raises(TypeError, match=r"must be a T2T-ViT of this library.*got FrozenT2TViT"):
        load_checkpoint(tmp_path / "w.pth", t2t_fast.freeze(model))


def test_integers_are_not_weights(tmp_path: Path) -> None:
    weights = {name: value.to(torch.int8) for name, value in small().state_dict().items()}
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"w\.pth: cls_token has dtype torch\.int8; accepted"):
        load_checkpoint(tmp_path / "w.pth", small())


# The grid of the position table


def plain(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without what it carries about the grid."""
    return dict(model.state_dict())


def write(kind: str, model: Any, path: Path) -> Path:
    """Write a model's weights as our function or as the usual tools write them."""
    if kind in (".pth", ".safetensors", ".npz"):
        path = path.with_suffix(kind)
        save_checkpoint(model.state_dict(), path)
    elif kind == "torch.save":
        torch.save({"state_dict": model.state_dict()}, path)
    elif kind == "wrapped":
        torch.save({"state_dict": nn.DataParallel(model).state_dict()}, path)
    return path


@pytest.mark.parametrize("kind", [".pth", ".safetensors", ".npz", "torch.save", "wrapped"])
def test_the_grid_is_recorded(tmp_path: Path, kind: str) -> None:
    source = small(seed=0, img_size=(32, 128))
    path = write(kind, source, tmp_path / "w.pth")
    assert read_checkpoint(path).grid_size == (2, 8)
    assert torch.equal(load_checkpoint(path, small(img_size=(32, 128)))["pos_embed"], source.pos_embed)
    square = small(img_size=64)  # as many tokens, in another grid
    load_checkpoint(path, square)
    assert torch.equal(square.pos_embed, resize_table(source.pos_embed, (2, 8), (4, 4)))
    assert not torch.equal(square.pos_embed, source.pos_embed)
    larger = small(img_size=(64, 160))
    load_checkpoint(path, larger)
    assert torch.equal(larger.pos_embed, resize_table(source.pos_embed, (2, 8), (4, 10)))


def test_create_model_takes_the_recorded_grid(tmp_path: Path) -> None:
    source = t2t_fast.create_model("t2t_vit_7", img_size=(32, 128), num_classes=3)
    save_checkpoint(source.state_dict(), tmp_path / "w.safetensors")
    model = t2t_fast.create_model(checkpoint=tmp_path / "w.safetensors")
    assert model.img_size == (32, 128)
    assert_same(model.state_dict(), source.state_dict())


def test_convert_keeps_the_grid(tmp_path: Path) -> None:
    source = t2t_fast.create_model("t2t_vit_7", img_size=(32, 128), num_classes=3)
    save_checkpoint(source.state_dict(), tmp_path / "a.pth")
    assert main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "b.npz"), "--to", "paddlevit"]) == 0
    assert read_checkpoint(tmp_path / "b.npz").grid_size == (2, 8)


def test_a_grid_that_is_not_recorded_is_never_guessed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "w.pth"
    source = small(seed=0, img_size=(32, 128))
    torch.save(plain(source), path)
    wide = small(img_size=(32, 128))
    load_checkpoint(path, wide)
    assert torch.equal(wide.pos_embed, source.pos_embed)
    assert "took pos_embed as one of 2x8 tokens" in caplog.text and "grid_size=(4, 4)" in caplog.text
    load_checkpoint(path, wide, grid_size=(4, 4))
    assert torch.equal(wide.pos_embed, resize_table(source.pos_embed, (4, 4), (2, 8)))

    source = small(seed=0, img_size=(32, 96))
    torch.save(plain(source), path)
    with pytest.raises(CheckpointError, match="cannot be resized unless grid_size tells"):
        load_checkpoint(path, wide)
    load_checkpoint(path, wide, grid_size=(2, 6))
    assert torch.equal(wide.pos_embed, resize_table(source.pos_embed, (2, 6), (2, 8)))


# What create_model makes of a checkpoint


def test_features_only_with_a_checkpoint(tmp_path: Path) -> None:
    source = t2t_fast.create_model("t2t_vit_7", img_size=64, num_classes=3).eval()
    save_checkpoint(source.state_dict(), tmp_path / "w.pth")
    features = t2t_fast.create_model(
        "t2t_vit_7", checkpoint=tmp_path / "w.pth", features_only=True, out_indices=(1, 4)
    ).eval()
    images = torch.randn(2, 3, 64, 64)
    wanted = source.forward_intermediates(images, indices=[1, 4], intermediates_only=True)
    for got, want in zip(features(images), wanted, strict=True):
        assert torch.equal(got, want)


def test_a_folder_as_timm_saves_it(tmp_path: Path) -> None:
    source = timm.create_model("t2t_vit_14_resnext", img_size=(32, 64), num_classes=3)
    timm.models.save_for_hf(source, tmp_path / "m", safe_serialization=True)
    model = t2t_fast.create_model(checkpoint=tmp_path / "m")
    assert model.img_size == (32, 64) and model.blocks[0].attn.num_heads == 32
    assert_same(model.state_dict(), source.state_dict())
    again = timm.create_model(f"local-dir:{tmp_path / 'm'}", img_size=64, num_classes=3, pretrained=True)
    assert torch.equal(again.pos_embed, resize_table(source.pos_embed, (2, 4), (4, 4)))
