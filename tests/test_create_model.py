"""t2t_fast.create_model: names, tags, what is read off a checkpoint, and being offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import timm
import timm.models._builder
import torch

import t2t_fast
from t2t_fast.models.variants import VARIANTS

SMALL = {"img_size": 32, "num_classes": 3}


def test_all_names_are_registered_with_timm() -> None:
    assert set(t2t_fast.list_models()) == set(VARIANTS)
    assert t2t_fast.list_models("*_t_*") == ["t2t_vit_t_14", "t2t_vit_t_19", "t2t_vit_t_24"]
    assert set(VARIANTS) <= set(timm.list_models("t2t_vit_*"))


def test_official_spelling_and_weight_tags() -> None:
    assert type(t2t_fast.create_model("T2t_vit_7", **SMALL)) is t2t_fast.T2TViT
    with pytest.warns(UserWarning, match="deprecated model name"):
        assert type(timm.create_model("T2t_vit_7", **SMALL)) is t2t_fast.T2TViT
    large = t2t_fast.create_model("t2t_vit_14.in1k_384", depth=1)
    assert large.img_size == (384, 384)
    assert large.pretrained_cfg["crop_pct"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs a name or checkpoint="),
        ({"name": "t2t_vit_15"}, "name='t2t_vit_15' is no T2T-ViT of this package; accepted: t2t_vit_7"),
        ({"name": "t2t_vit_7", "checkpoint": "x.pth", "pretrained": True}, "pass one of them"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        t2t_fast.create_model(**arguments)


@pytest.mark.parametrize(
    ("name", "file"),
    [("t2t_vit_14", "81.5_T2T_ViT_14.pth.tar"), ("t2t_vit_14.in1k_384", "83.3_T2T_ViT_14.pth.tar")],
)
def test_offline_names_the_address(name: str, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def offline(url: str, **kwargs: Any) -> str:
        asked.append(url)
        raise URLError("no network")

    monkeypatch.setattr(timm.models._builder, "download_cached_file", offline)
    with pytest.raises(RuntimeError, match=rf"no network.*{file} .* pass its path as checkpoint="):
        t2t_fast.create_model(name, pretrained=True)
    assert asked[0].endswith(file)
    with pytest.raises(RuntimeError, match="No pretrained weights exist for t2t_vit_dense"):
        t2t_fast.create_model("t2t_vit_dense", pretrained=True)


def test_what_the_call_leaves_open_is_read_off_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    source = t2t_fast.create_model("t2t_vit_7", num_classes=10, img_size=64, in_chans=1).eval()
    torch.save({"state_dict": source.state_dict()}, path)
    images = torch.randn(2, 1, 64, 64)
    for model in (t2t_fast.create_model(checkpoint=path), t2t_fast.create_model("t2t_vit_7", checkpoint=path)):
        assert torch.equal(model.eval()(images), source(images))
    other = t2t_fast.create_model(checkpoint=path, num_classes=4, img_size=(48, 80), in_chans=3).eval()
    assert other(torch.randn(1, 3, 48, 80)).shape == (1, 4)
    with pytest.raises(t2t_fast.CheckpointError, match=r"weights\.pth.*t2t_vit_7.*t2t_vit_10"):
        t2t_fast.create_model("t2t_vit_10", checkpoint=path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        t2t_fast.create_model("t2t_vit_7", checkpoint=tmp_path / "nowhere.pth")


def test_a_custom_depth_loads_when_the_call_describes_it(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    source = t2t_fast.create_model("t2t_vit_7", depth=2, **SMALL)
    torch.save(source.state_dict(), path)
    model = t2t_fast.create_model("t2t_vit_7", checkpoint=path, depth=2, **SMALL)
    assert torch.equal(model.head.weight, source.head.weight)
    with pytest.raises(t2t_fast.CheckpointError, match="depth is 2 instead of 7"):
        t2t_fast.create_model(checkpoint=path)
