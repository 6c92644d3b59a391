"""Checkpoints: read from any project, recognised, fitted to other models, saved; damaged and hostile ones refused."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import adapt_input_conv
from torch import Tensor
from weights import SHAPES, assert_same, constant, small

import t2t_fast
from t2t_fast.cli import main
from t2t_fast.models.checkpoints import (
    CheckpointError,
    LoudNote,
    adapt_state_dict,
    infer_architecture,
    load_checkpoint,
    lookalikes,
    read_checkpoint,
    save_checkpoint,
)

# Reading


@pytest.mark.parametrize("container", ["state_dict_ema", "model_ema", "state_dict", "model", "bare"])
@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".pt", ".bin"])
def test_containers(tmp_path: Path, container: str, suffix: str) -> None:
    weights = constant("t2t_vit_7")
    torch.save(weights if container == "bare" else {container: weights, "epoch": 3}, tmp_path / f"w{suffix}")
    checkpoint = read_checkpoint(tmp_path / f"w{suffix}")
    assert (checkpoint.source, checkpoint.layout) == (container, "official")
    assert list(checkpoint.state_dict) == list(SHAPES["t2t_vit_7"])


def test_ema_weights_are_preferred_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"state_dict": constant("t2t_vit_7", 1.0), "state_dict_ema": constant("t2t_vit_7", 2.0)}, path)
    ema, plain = read_checkpoint(path), read_checkpoint(path, use_ema=False)
    assert (ema.source, ema.state_dict["head.bias"][0]) == ("state_dict_ema", 2)
    assert (plain.source, plain.state_dict["head.bias"][0]) == ("state_dict", 1)
    assert ema.notes == ("took the weights in state_dict_ema, left those in state_dict",)

    torch.save({"state_dict_ema": constant("t2t_vit_7")}, path)
    only = read_checkpoint(path, use_ema=False)
    assert only.source == "state_dict_ema"
    assert only.notes == ("took the averaged weights in state_dict_ema: the file has no others",)


def test_module_prefix_and_foreign_entries(tmp_path: Path) -> None:
    weights: dict[str, Any] = {f"module.{key}": value for key, value in constant("t2t_vit_14").items()}
    torch.save({"state_dict": {**weights, "steps": 7}}, tmp_path / "w.pth")
    checkpoint = read_checkpoint(tmp_path / "w.pth")
    assert list(checkpoint.state_dict) == list(SHAPES["t2t_vit_14"])
    assert checkpoint.notes == ("ignored what is not a tensor: steps",)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_training_scripts_save_beside_the_weights(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "w.pth.tar"
    content = {
        "epoch": 309,
        "args": argparse.Namespace(lr=5e-4, amp=True),
        "metric": np.float64(81.5),
        "loss": np.float32(1.0),
        "state_dict": constant("t2t_vit_14"),
    }
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert read_checkpoint(path).source == "state_dict"
    if not zipped:  # the name of the scalar's constructor before NumPy 2
        path.write_bytes(path.read_bytes().replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray"))
        assert b"cnumpy.core.multiarray" in path.read_bytes()
        assert read_checkpoint(path).source == "state_dict"


class Malicious:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("kind", ["zip", "legacy", "npz"])
def test_pickled_code_is_not_executed(tmp_path: Path, kind: str) -> None:
    trace = tmp_path / "executed"
    path = tmp_path / ("w.npz" if kind == "npz" else "w.pth")
    if kind == "npz":
        np.savez(path, cls_token=np.array([Malicious(trace)], dtype=object))
    else:
        content = {"state_dict": constant("t2t_vit_7"), "extra": Malicious(trace)}
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match="not executed") as caught:
        read_checkpoint(path)
    assert kind == "npz" or "mkdir" in str(caught.value)
    assert str(path) in str(caught.value)
    assert not trace.exists()


def _truncated(path: Path) -> None:
    torch.save({"state_dict": {"cls_token": torch.zeros(10000)}}, path)
    path.write_bytes(path.read_bytes()[:9000])


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("w.pth", _truncated, "truncated, damaged"),
        ("w.safetensors", lambda path: path.write_bytes(b"\x10\0\0\0\0\0\0\0\xff"), "truncated, damaged"),
        ("w.npz", lambda path: path.write_bytes(b"PK\x03\x04\0\0"), "truncated, damaged"),
        ("w.pth", lambda path: path.touch(), "the file is empty"),
        ("w.npz", lambda path: path.touch(), "the file is empty"),
        ("w.safetensors", lambda path: path.touch(), "the file is empty"),
        ("w.pth", lambda path: path.write_text("\n<!DOCTYPE html>\n<html>Sign in"), "HTML page"),
        ("w.safetensors", lambda path: path.write_text("<html>404"), "HTML page"),
        ("w.npz", lambda path: path.write_text("<html>404"), "HTML page"),
        ("w.pth", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
        ("w.pth", lambda path: path.write_text("hello world"), "text file"),
        ("w.pth", lambda path: path.mkdir(), "is a directory"),
        ("w.npy", lambda path: np.save(path, np.zeros(3)), r"expected \.npz"),
        ("w.pdparams", lambda path: path.touch(), r"numpy\.savez\('weights\.npz'"),
        ("w.pth", lambda path: torch.save([torch.zeros(1)], path), "holds a list, not a dictionary"),
        ("w.pth", lambda path: torch.save({"epoch": 3}, path), "holds no T2T-ViT: found epoch; missing cls_token"),
        ("w.pth", lambda path: torch.save({}, path), "holds no T2T-ViT: found nothing"),
        ("w.npz", lambda path: np.savez(path, cls_token=np.array(["a"])), "cls_token|can't convert"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, write: Callable[[Path], object], message: str) -> None:
    path = tmp_path / name
    write(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such checkpoint file.*nowhere\.pth"):
        load_checkpoint(tmp_path / "nowhere.pth")


def test_other_models(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(timm.create_model("resnet18").state_dict(), path)
    with pytest.raises(
        CheckpointError,
        match=r"holds no T2T-ViT: found conv1\.weight, .* and 118 more; missing cls_token, .* no model comes close",
    ):
        read_checkpoint(path)
    with torch.device("meta"):
        vit = timm.create_model("vit_small_patch16_224", depth=2)
    with pytest.raises(CheckpointError, match=r"missing tokens_to_token\.project\.weight, .* closest model t2t_vit_"):
        infer_architecture(vit.state_dict())


# Recognising the model


@pytest.mark.parametrize("name", SHAPES)
def test_infer_original_models(name: str) -> None:
    wanted = {"num_classes": 1000, "in_chans": 3, "token_dim": 64, "qkv_bias": False, "img_size": 224}
    expected = "t2t_vit_14" if name == "t2t_vit_14_resnext" else name
    assert infer_architecture(constant(name)) == (expected, wanted)


@pytest.mark.parametrize("name", t2t_fast.list_models())
def test_infer_own_models(name: str) -> None:
    kwargs = {"num_classes": 7, "in_chans": 5, "token_dim": 32, "img_size": 64, "qkv_bias": True}
    with torch.device("meta"):
        model = t2t_fast.create_model(name, **kwargs)
        state_dict = model.state_dict()
        found, arguments = infer_architecture(state_dict)
        assert found == name or found in lookalikes(name)
        assert arguments == kwargs
        again = t2t_fast.create_model(found, **arguments)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in state_dict.items()}


def test_infer_partial_and_custom() -> None:
    assert lookalikes("t2t_vit_14") == ("t2t_vit_14_resnext",)
    assert lookalikes("t2t_vit_7") == ()
    weights = constant("t2t_vit_t_14")
    backbone = {key: value for key, value in weights.items() if not key.startswith("head.")}
    backbone["pos_embed"] = torch.zeros(1, 1 + 10 * 20, 384)
    assert infer_architecture(backbone) == (
        "t2t_vit_t_14",
        {"num_classes": 0, "in_chans": 3, "token_dim": 64, "qkv_bias": False},
    )
    custom = {key: value for key, value in weights.items() if not key.startswith(("blocks.12.", "blocks.13."))}
    with pytest.raises(CheckpointError, match="the closest is t2t_vit_t_14, but depth is 12 instead of 14"):
        infer_architecture(custom)
    no_tokens = {key: value for key, value in weights.items() if "attention1" not in key}
    with pytest.raises(CheckpointError, match=r"missing tokens_to_token\.attention1\.kqv\.weight or "):
        infer_architecture(no_tokens)


# Fitting


def test_head() -> None:
    source = small(seed=0).state_dict()
    same, notes = adapt_state_dict(source, small())
    assert notes == []
    assert_same(same, source)

    model = small(num_classes=4)
    adapted, notes = adapt_state_dict(source, model)
    assert notes == ["the head is for 10 classes: the model keeps its own of 4"]
    assert isinstance(notes[0], LoudNote)
    assert torch.equal(adapted["head.weight"], model.head.weight)
    assert source["head.weight"].shape[0] == 10

    adapted, notes = adapt_state_dict(source, small(num_classes=0))
    assert notes == ["dropped the head of 10 classes: the model has none"]
    assert not any(key.startswith("head.") for key in adapted)

    headless = {key: value for key, value in source.items() if not key.startswith("head.")}
    adapted, notes = adapt_state_dict(headless, model)
    assert notes == ["no head in the weights: the model keeps its own of 4 classes"]
    model.load_state_dict(adapted, strict=True)
    assert adapt_state_dict(headless, small(num_classes=0))[1] == []


@pytest.mark.parametrize("img_size", [(384, 384), (160, 320)])
def test_position_table_is_resized(img_size: tuple[int, int]) -> None:
    source = small(img_size=224, seed=0).state_dict()
    model = small(img_size=img_size)
    height, width = model.grid_size
    adapted, notes = adapt_state_dict(source, model)
    assert notes == [f"resized pos_embed from 14x14 to {height}x{width} tokens"]
    model.load_state_dict(adapted, strict=True)

    table = source["pos_embed"]
    image = table[0, 1:].T.reshape(1, -1, 14, 14)
    wanted = F.interpolate(image, size=(height, width), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    assert torch.equal(adapted["pos_embed"][:, :1], table[:, :1])
    torch.testing.assert_close(adapted["pos_embed"][:, 1:], wanted)


def test_position_table_of_a_non_square_grid() -> None:
    source = small(img_size=(160, 320), seed=0).state_dict()
    same, notes = adapt_state_dict(source, small(img_size=(160, 320)))
    assert notes == []
    assert torch.equal(same["pos_embed"], source["pos_embed"])
    with pytest.raises(CheckpointError, match="pos_embed has 200 tokens, the model 14x14 = 196"):
        adapt_state_dict(source, small(img_size=224))


@pytest.mark.parametrize("tokens_type", ["performer", "convolution"])
@pytest.mark.parametrize(("in_chans", "tiling"), [(1, 3), (6, None)])
def test_in_chans_means_the_same_function(tokens_type: str, in_chans: int, tiling: int | None) -> None:
    original = small(tokens_type, seed=1).double()
    model = small(tokens_type, in_chans=in_chans).double()
    adapted, notes = adapt_state_dict(original.state_dict(), model)
    assert notes == [f"adapted the first layer from 3 to {in_chans} input channels"]
    model.load_state_dict(adapted, strict=True)
    images = torch.randn(2, 1 if tiling else 3, 32, 32, dtype=torch.float64)
    ours = model(images if tiling else images.repeat(1, 2, 1, 1))
    torch.testing.assert_close(ours, original(images.repeat(1, tiling or 1, 1, 1)), rtol=1e-11, atol=1e-11)


def test_in_chans_of_the_token_transformer() -> None:
    """Its projection has no bias: exact without a LayerNorm shift, as close as can be with one."""
    images = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    original, model = small("transformer", seed=2).double(), small("transformer", in_chans=1).double()
    norm = original.tokens_to_token.attention1.norm1

    def error(beta: Tensor, forget: bool = False) -> float:
        with torch.no_grad():
            norm.bias.copy_(beta)
            adapted, notes = adapt_state_dict(original.state_dict(), model)
            assert "kept only approximately" in notes[0]
            if forget:
                adapted["tokens_to_token.attention1.norm1.bias"].zero_()
            model.load_state_dict(adapted)
            wanted, given = (
                net.tokens_to_token(x) for net, x in ((original, images.repeat(1, 3, 1, 1)), (model, images))
            )
            return float((given - wanted).norm() / wanted.norm())

    assert error(torch.zeros_like(norm.bias)) < 1e-12
    beta = torch.randn_like(norm.bias) * 0.3
    assert error(beta) < error(beta, forget=True)


def test_in_chans_follows_the_rule_of_timm() -> None:
    source = small("convolution", seed=3).state_dict()
    adapted, _ = adapt_state_dict(source, small("convolution", in_chans=5))
    key = "tokens_to_token.soft_split0.weight"
    torch.testing.assert_close(adapted[key], adapt_input_conv(5, source[key]))
    half = {key: value.half() for key, value in source.items()}
    assert adapt_state_dict(half, small("convolution", in_chans=5))[0][key].dtype == torch.float16


# Saving


def test_save_replaces_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.pth"
    old, new = small(seed=0).state_dict(), small(seed=1).state_dict()
    save_checkpoint(old, path)

    def broken_save(content: object, file: Any) -> None:
        file.write(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(torch, "save", broken_save)
        save_checkpoint(new, path)
    assert_same(load_checkpoint(path), old)
    assert os.listdir(tmp_path) == ["w.pth"]
    save_checkpoint(new, path)
    assert_same(load_checkpoint(path), new)
    assert os.listdir(tmp_path) == ["w.pth"]


def test_save_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    weights = small("performer").state_dict()
    with pytest.raises(CheckpointError, match="mmpretrain has transformer tokens and standard blocks only"):
        save_checkpoint(weights, tmp_path / "w.pth", "mmpretrain")
    with pytest.raises(CheckpointError, match=r"must end in \.pth"):
        save_checkpoint(weights, tmp_path / "w.onnx")
    with pytest.raises(FileNotFoundError):
        save_checkpoint(weights, tmp_path / "nowhere" / "w.pth")
    assert os.listdir(tmp_path) == []


def test_save_bfloat16_and_views(tmp_path: Path) -> None:
    weights = {key: value.bfloat16() for key, value in small(seed=0).state_dict().items()}
    weights["cls_token"] = weights["cls_token"][:, :, :1].expand(-1, -1, 32)
    for suffix in (".npz", ".safetensors", ".pt"):
        save_checkpoint(weights, tmp_path / f"w{suffix}")
        assert_same({k: v.bfloat16() for k, v in load_checkpoint(tmp_path / f"w{suffix}").items()}, weights)


# The command


def run_convert(*arguments: str | Path) -> int:
    return main(["convert", *map(str, arguments)])


def test_convert_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "a.pth.tar", tmp_path / "b.safetensors"
    weights = t2t_fast.create_model("t2t_vit_7", num_classes=5, img_size=32).state_dict()
    torch.save({"state_dict": weights, "state_dict_ema": {k: v + 1 for k, v in weights.items()}}, source)
    assert run_convert(source, target, "--to", "paddlevit", "--no-ema") == 0
    output = capsys.readouterr().out
    for part in ("from state_dict, official layout", "t2t_vit_7, num_classes=5", f"wrote  {target}: paddlevit layout"):
        assert part in output
    assert_same(load_checkpoint(target), weights)

    assert run_convert(source, target) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"t2t-fast: error: {target}: exists") and "--force" in error and error.count("\n") == 1
    assert run_convert(source, target, "--force") == 0
    assert_same(load_checkpoint(target), {k: v + 1 for k, v in weights.items()})
    capsys.readouterr()
    (tmp_path / "damaged.pth").write_bytes(b"")
    for arguments, message in (
        ((tmp_path / "none.pth", "c.pth"), "none.pth: no such checkpoint file"),
        ((tmp_path / "damaged.pth", "c.pth"), "damaged.pth: cannot be read as a checkpoint: the file is empty"),
        ((source, tmp_path / "c.pth", "--to", "mmpretrain"), "a.pth.tar: name='tokens_to_token.attention1.w'"),
        ((source, tmp_path / "c.onnx"), "c.onnx' must end in .pth"),
        ((source, tmp_path / "absent" / "c.pth"), f"{tmp_path / 'absent' / 'c.pth'}: no such folder"),
    ):
        assert run_convert(*arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("t2t-fast: error: ")
        assert message in line
    assert not list(tmp_path.glob("*c.*"))
