"""Files that mean something else than they seem to: several heads, other arguments, claims without values, loops."""

from __future__ import annotations

import logging
import os
import random
import time
import types
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from weights import assert_same, small

import t2t_fast
from t2t_fast.models.checkpoints import CheckpointError, load_checkpoint, read_checkpoint, save_checkpoint
from t2t_fast.models.layouts import from_official
from t2t_fast.models.pos_embed import resize_table

WEIGHTS = dict(small(seed=0).state_dict())


def saved(tmp_path: Path, content: Any, name: str = "w.pth") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


# Heads


def test_a_head_that_is_no_linear_is_not_dropped_quietly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = t2t_fast.create_model("t2t_vit_7", img_size=32)
    model.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(256, 5))
    path = saved(tmp_path, model.state_dict())
    again = t2t_fast.create_model(checkpoint=path)
    assert isinstance(again.head, nn.Identity)
    (record,) = (r for r in caplog.records if "dropped the head" in r.getMessage())
    assert record.levelno == logging.WARNING and "give the model such a head" in record.getMessage()
    again.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(256, 5))
    load_checkpoint(path, again)
    assert_same(again.state_dict(), dict(model.state_dict()))


@pytest.mark.parametrize("own_first", [True, False])
def test_a_head_inside_and_one_beside_a_backbone(tmp_path: Path, own_first: bool) -> None:
    """The backbone's own head is its head; another one beside it is not."""
    inside = {f"backbone.{name}": value for name, value in WEIGHTS.items()}
    beside = {"head.weight": torch.ones(10, 32), "head.bias": torch.ones(10)}
    model = small(seed=1)
    load_checkpoint(saved(tmp_path, {**inside, **beside} if own_first else {**beside, **inside}), model)
    assert_same(model.state_dict(), WEIGHTS)
    headless = {name: value for name, value in inside.items() if "head" not in name}
    load_checkpoint(saved(tmp_path, {**beside, **headless}), model)
    assert_same(model.state_dict(), {**WEIGHTS, **beside})


def test_two_entries_for_one_parameter_are_refused(tmp_path: Path) -> None:
    twice = {**WEIGHTS, "blocks.0._orig_mod.mlp.fc1.weight": WEIGHTS["blocks.0.mlp.fc1.weight"] + 1}
    with pytest.raises(CheckpointError, match=r"holds 'blocks\.0\.mlp\.fc1\.weight' twice"):
        load_checkpoint(saved(tmp_path, twice), small())


class Adapter(nn.Module):
    """A Linear with a low-rank addition, named as PEFT names it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base_layer = linear
        self.lora_A = nn.ModuleDict({"default": nn.Linear(linear.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, linear.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Saved(nn.Module):
    """A module with a trained copy of it, named as PEFT's ``modules_to_save``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict({"default": nn.Linear(module.in_features, module.out_features)})  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.modules_to_save["default"](x)


@pytest.mark.parametrize("kind", [Adapter, Saved])
def test_heads_of_peft(tmp_path: Path, kind: Any) -> None:
    def adapted(seed: int) -> nn.Module:
        model = small(seed=seed)
        torch.manual_seed(seed)
        model.head = kind(model.head)
        model.blocks[0].attn.qkv = Adapter(model.blocks[0].attn.qkv)
        return nn.ModuleDict({"base_model": nn.ModuleDict({"model": model})})

    source, by_state, by_file = adapted(0), adapted(1), adapted(2)
    by_state.load_state_dict(source.state_dict())
    load_checkpoint(saved(tmp_path, source.state_dict()), by_file)
    images = torch.randn(2, 3, 32, 32)
    want = source["base_model"]["model"](images)
    for model in (by_state, by_file):
        assert torch.equal(model["base_model"]["model"](images), want)


def test_foreign_parts_of_blocks_and_heads(tmp_path: Path) -> None:
    def changed(seed: int) -> Any:
        model: Any = small(seed=seed)
        model.head = nn.LayerNorm(32)
        model.blocks[0].bn = nn.BatchNorm1d(3)
        return model

    source, model = changed(0), changed(1)
    load_checkpoint(saved(tmp_path, nn.DataParallel(source).state_dict()), model)
    assert_same(model.state_dict(), dict(source.state_dict()))


# Arguments and grids


@pytest.mark.parametrize(
    "change", [{"global_pool": "avg"}, {"num_heads": 8}, {"qk_scale": 0.5}, {"img_size": (24, 120)}]
)
def test_folders_tell_the_model_s_arguments(tmp_path: Path, change: dict[str, Any]) -> None:
    source = timm.create_model("t2t_vit_7", num_classes=3, **{"img_size": 32, **change}).eval()
    timm.models.save_for_hf(source, tmp_path / "m", safe_serialization=True)
    model = t2t_fast.create_model(checkpoint=tmp_path / "m").eval()
    images = torch.randn(2, 3, *source.img_size)
    assert torch.equal(model(images), source(images))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
@pytest.mark.parametrize("name", ["t2t_vit_7", "t2t_vit_c_14"])
def test_the_grid_of_a_file_that_timm_is_given(tmp_path: Path, suffix: str, name: str) -> None:
    """``pretrained_cfg_overlay=dict(file=...)``: the file's own grid, never that of the released weights."""
    source = timm.create_model(name, img_size=(32, 128), num_classes=3, depth=1)
    path = tmp_path / f"w{suffix}"
    save_checkpoint(source.state_dict(), path)
    overlay = {"file": str(path), "num_classes": 3}
    options = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    model = timm.create_model(name, img_size=64, num_classes=3, depth=1, **options)
    assert torch.equal(model.pos_embed, resize_table(source.pos_embed, (2, 8), (4, 4)))


@pytest.mark.parametrize("feature_cls", ["getter", "hook", "fx"])
def test_features_of_every_kind(tmp_path: Path, feature_cls: str) -> None:
    source = t2t_fast.create_model("t2t_vit_7", img_size=32, num_classes=3)
    save_checkpoint(source.state_dict(), tmp_path / "w.pth")
    options = {"features_only": True, "out_indices": (1, 3), "feature_cls": feature_cls}
    features = t2t_fast.create_model("t2t_vit_7", checkpoint=tmp_path / "w.pth", **options).eval()
    want = {name: value for name, value in source.state_dict().items() if name.startswith("blocks.1.")}
    got = {f"blocks.1.{n.partition('blocks.1.')[2]}": v for n, v in features.state_dict().items() if "blocks.1." in n}
    assert_same(got, want)


def test_a_plain_vit_beside_is_no_rival(tmp_path: Path) -> None:
    teacher = {f"teacher.{n}": v for n, v in timm.create_model("vit_tiny_patch16_224", depth=1).state_dict().items()}
    model = small(seed=1)
    load_checkpoint(saved(tmp_path, {**teacher, **{f"net.{n}": v for n, v in WEIGHTS.items()}}), model)
    assert_same(model.state_dict(), WEIGHTS)


# Claims


def claims(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: torch.zeros((), dtype=dtype).expand(shape)}


@pytest.mark.parametrize(
    "change",
    [
        claims("tokens_to_token.attention1.norm1.weight", 49_000_000),
        claims("tokens_to_token.project.weight", 256, 900_000),
        claims("head.weight", 400_000_000, 1, dtype=torch.float16),
        claims("pos_embed", 1, 20_000**2 + 1, 1, dtype=torch.float16),
        claims("tokens_to_token.attention1.norm1.weight", 10),
        claims("tokens_to_token.project.weight", 256, 5),
    ],
)
def test_shapes_are_compared_before_memory_is_asked_for(tmp_path: Path, change: dict[str, Tensor]) -> None:
    with torch.device("meta"):
        names = {name: value.shape for name, value in t2t_fast.create_model("t2t_vit_7").state_dict().items()}
    path = saved(tmp_path, {**{name: torch.zeros(()).expand(shape) for name, shape in names.items()}, **change})
    with pytest.raises(CheckpointError) as caught:
        t2t_fast.create_model(checkpoint=path)
    assert str(caught.value).startswith(f"{path}: ")


def test_expanded_weights_of_paddle_are_not_transposed_first(tmp_path: Path) -> None:
    weights = from_official(WEIGHTS, "paddlevit") | {"head.weight": torch.zeros(1).expand(32, 900_000_000)}
    with pytest.raises(CheckpointError, match="claims 115200000000 bytes"):
        read_checkpoint(saved(tmp_path, weights))


def test_a_refused_file_changes_nothing(tmp_path: Path) -> None:
    wrong = {**WEIGHTS, "norm.weight": torch.ones(7), "blocks.9.norm1.weight": torch.ones(32)}
    model = small(seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=r"of another shape: norm\.weight \(7,\) for \(32,\)"):
            load_checkpoint(saved(tmp_path, wrong), model, strict=strict)
        assert_same(model.state_dict(), before)


# Odd containers


def test_metadata_that_is_none(tmp_path: Path) -> None:
    for metadata in ([1], 3, {"": 3}, {"": {"grid_size": "2x2"}}):
        state_dict = small(seed=0).state_dict()
        state_dict._metadata = metadata
        model = small(seed=1)
        load_checkpoint(saved(tmp_path, state_dict), model)
        assert_same(model.state_dict(), WEIGHTS)


def test_dictionaries_that_hold_one_another(tmp_path: Path) -> None:
    loop: dict[str, Any] = {}
    loop.update({f"key{i}": loop for i in range(40)})
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="holds no T2T-ViT"):
        read_checkpoint(saved(tmp_path, loop))
    assert time.monotonic() - start < 10


def test_read_only_mappings(tmp_path: Path) -> None:
    model = small(seed=1)
    load_checkpoint(types.MappingProxyType(WEIGHTS), model)
    assert_same(model.state_dict(), WEIGHTS)


def test_damaged_ends(tmp_path: Path) -> None:
    """The directory of a ZIP archive stands at its end."""
    draw = random.Random(2)
    for suffix in (".pth", ".npz"):
        path = tmp_path / f"w{suffix}"
        save_checkpoint({name: value for name, value in WEIGHTS.items() if value.numel() < 200}, path)
        whole = path.read_bytes()
        for _ in range(100):
            damaged = bytearray(whole)
            for _ in range(draw.randint(1, 4)):
                damaged[-draw.randint(1, 4000)] = draw.randrange(256)
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match="w"):
                read_checkpoint(path)


def test_folders_with_odd_neighbours(tmp_path: Path) -> None:
    saved(tmp_path, WEIGHTS, "best.pth")
    os.mkfifo(tmp_path / "config.json")
    assert_same(read_checkpoint(tmp_path).state_dict, WEIGHTS)
    index = tmp_path / "model.safetensors.index.json"
    for name in ("x" * 5000, index.name):
        index.write_text(f'{{"weight_map": {{"cls_token": "{name}"}}}}')
        with pytest.raises(CheckpointError, match="no file of weights in its folder"):
            read_checkpoint(tmp_path)


def test_arguments() -> None:
    for arguments, error in (
        ({"model": 3}, TypeError),
        ({"grid_size": "ab"}, TypeError),
        ({"grid_size": (-2, -8)}, ValueError),
        ({"grid_size": (1, 2, 3)}, TypeError),
    ):
        with pytest.raises(error, match=next(iter(arguments))):
            load_checkpoint(WEIGHTS, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is no name of a file"):
        read_checkpoint("")
