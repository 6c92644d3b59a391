"""The command line, as a user meets it: odd image files, failures by name, exit codes, whole JSON files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

import t2t_fast
from t2t_fast.cli import COMMANDS, main, predict
from t2t_fast.cli.images import ImageError, find_images, read_image
from t2t_fast.models.variants import VARIANTS

SMALL = ["--model", "t2t_vit_7", "--img-size", "64", "--device", "cpu"]


def gradient(height: int = 24, width: int = 32) -> np.ndarray:
    """An RGB test picture, (height, width, 3) uint8, no two corners alike."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return (np.stack((x, y, 1 - x), axis=-1) * 255).astype(np.uint8)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(gradient()).save(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a t2t_vit_7 for 5 classes and 64 x 64 pixels."""
    torch.manual_seed(0)
    model = t2t_fast.create_model("t2t_vit_7", num_classes=5, img_size=64)
    path = tmp_path_factory.mktemp("weights") / "five.pth"
    t2t_fast.save_checkpoint(model.state_dict(), path)
    return path


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main([str(arg) for arg in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# Reading images


def read(image: Image.Image, path: Path, **kwargs: Any) -> np.ndarray:
    image.save(path, **kwargs)
    result = read_image(path)
    assert result.mode == "RGB"
    return np.asarray(result).astype(int)


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    expected = np.repeat(np.array([[0, 1, 128, 255]])[..., None], 3, axis=2)
    for name in ("deep.png", "deep.tif", "deep.pgm"):
        np.testing.assert_array_equal(read(Image.fromarray(values), tmp_path / name), expected)
    np.testing.assert_array_equal(read(Image.fromarray(values.astype(np.int32)), tmp_path / "i.tif"), expected)
    np.testing.assert_array_equal(read(Image.fromarray(values.astype(">u2")), tmp_path / "big.tif"), expected)
    floats = (values / 65535).astype(np.float32)
    np.testing.assert_array_equal(read(Image.fromarray(floats), tmp_path / "f.tif"), expected)


@pytest.mark.parametrize("values", [np.array([[0, 1 << 20]], np.int32), np.array([[np.nan, 1.0]], np.float32)])
def test_values_without_a_known_range_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(ImageError, match="expected 0 to"):
        read_image(tmp_path / "x.tif")


def test_grey_and_bilevel(tmp_path: Path) -> None:
    grey = gradient()[..., 0]
    np.testing.assert_array_equal(read(Image.fromarray(grey), tmp_path / "l.png"), np.repeat(grey[..., None], 3, 2))
    bits = Image.fromarray(grey > 100)
    assert bits.mode == "1"
    assert set(np.unique(read(bits, tmp_path / "bits.png"))) == {0, 255}
    assert read_image(tmp_path / "l.png", grey=True).mode == "L"
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "l.png", grey=True)), grey)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_on_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 128))
    result = read(image.convert(mode), tmp_path / "x.png")
    assert result[0, :, 0].tolist() == [0, 127, 255]


def test_transparent_colour_lies_on_white(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((0, 0), (0, 0, 0))
    assert read(image, tmp_path / "x.png", transparency=(1, 2, 3)).tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_palettes(tmp_path: Path) -> None:
    image = Image.new("P", (4, 2), 1)
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    opaque = read(image, tmp_path / "p.png")
    assert opaque[0, 0].tolist() == [255, 0, 0]
    assert opaque[1, 1].tolist() == [0, 255, 0]
    for name in ("t.png", "t.gif"):
        transparent = read(image, tmp_path / name, transparency=1)
        assert transparent[0, 0].tolist() == [255, 0, 0]
        assert transparent[1, 1].tolist() == [255, 255, 255]


def test_cmyk(tmp_path: Path) -> None:
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    for name in ("c.jpg", "c.tif"):
        np.testing.assert_allclose(read(cyan, tmp_path / name)[8, 8], [0, 255, 255], atol=3)


def test_animated_gif_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    result = read(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert result[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    picture = gradient(8, 8)
    stored = {  # how a camera stores what is to be shown as `picture`
        1: picture,
        2: picture[:, ::-1],
        3: picture[::-1, ::-1],
        4: picture[::-1],
        5: picture.transpose(1, 0, 2),
        6: np.rot90(picture),
        7: np.rot90(picture, 2).transpose(1, 0, 2),
        8: np.rot90(picture, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    result = read(Image.fromarray(np.ascontiguousarray(stored)), tmp_path / "o.png", exif=exif)
    np.testing.assert_array_equal(result, picture)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_cost_the_picture(tmp_path: Path) -> None:
    for exif in (b"Exif\x00\x00garbage", b"Exif\x00\x00MM\x00*\x00\x00\xff\xff", b"Exif\x00\x00"):
        assert read(Image.fromarray(gradient()), tmp_path / "x.jpg", exif=exif).shape == (24, 32, 3)


def test_postscript_is_not_handed_to_another_program(tmp_path: Path) -> None:
    Image.fromarray(gradient()).save(tmp_path / "x.eps")
    with pytest.raises(ImageError, match="not an image in a format"):
        read_image(tmp_path / "x.eps")


def make_bad_files(folder: Path) -> dict[str, str]:
    """Files that cannot be read: name to what the reason must contain."""
    folder.mkdir(exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "truncated.jpg")
    whole = (folder / "truncated.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(noise).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:200])
    (folder / "empty.jpg").touch()
    (folder / "text.png").write_text("not an image")
    Image.new("L", (1001, 5)).save(folder / "thread.png")
    return {
        "truncated.jpg": "truncated",
        "cut.png": "cannot be decoded",
        "empty.jpg": "the file is empty",
        "text.png": "not an image",
        "thread.png": "too narrow",
    }


def test_bad_files_have_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, reason in make_bad_files(tmp_path).items():
        with pytest.raises(ImageError, match=reason):
            read_image(tmp_path / name)
    with pytest.raises(ImageError, match="no such file"):
        read_image(tmp_path / "absent.jpg")
    with pytest.raises(ImageError, match="directory"):
        read_image(tmp_path)
    Image.new("L", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(ImageError, match=r"too large: .*decompression bomb"):
        read_image(tmp_path / "bomb.png")


# Finding images


def test_find_images(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "notes.txt", "sub/c.webp", ".hidden/d.png", "._b.jpg", "odd[1].png", "data"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()

    def find(*names: str) -> tuple[list[str], list[str]]:
        files, failures = find_images([str(tmp_path / name) for name in names])
        return [os.path.relpath(file, tmp_path) for file in files], [failure.reason for failure in failures]

    everything = ["a.png", "b.JPG", "odd[1].png", "sub/c.webp"]
    assert find("") == (everything, [])
    assert find("**/*.webp", "", "a.png")[0] == ["sub/c.webp", "a.png", "b.JPG", "odd[1].png"]
    assert find("odd[1].png", "data") == (["odd[1].png", "data"], [])
    assert find("*.gif", "empty", "a.png") == (["a.png"], ["no file matches", "no images in this folder"])
    assert find("absent.png") == (["absent.png"], [])  # reported when it is read


# predict


def test_predict_equals_pipeline_by_hand(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = []
    for i, shape in enumerate([(80, 120), (64, 64), (200, 90)]):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(gradient(*shape)[:, :: (-1) ** i]).save(paths[-1])
    target = tmp_path / "out.json"
    code, out, _ = run(
        capsys, "predict", *paths, "--checkpoint", checkpoint, "--json", target, "--batch-size", 2, "--device", "cpu"
    )
    assert code == 0
    assert "2.png" in out

    model = t2t_fast.create_model("t2t_vit_7", num_classes=5, img_size=64).eval()
    t2t_fast.load_checkpoint(checkpoint, model)
    transform = create_transform(**resolve_data_config({"input_size": (3, 64, 64)}, model=model))
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    with torch.no_grad():
        expected = model(images).softmax(-1)

    record = json.loads(target.read_text())
    assert record["model"] == "t2t_vit_7"
    assert record["weights"] == str(checkpoint)
    assert record["image_size"] == [64, 64]
    assert record["failed"] == []
    assert [image["file"] for image in record["images"]] == [str(path) for path in paths]
    for image, row in zip(record["images"], expected, strict=True):
        assert [p["index"] for p in image["top"]] == row.argsort(descending=True).tolist()
        for prediction in image["top"]:
            assert prediction["probability"] == pytest.approx(row[prediction["index"]].item(), abs=1e-6)
            assert prediction["label"] == str(prediction["index"])


def test_bad_files_are_named_and_the_rest_goes_on(
    tmp_path: Path, photo: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = make_bad_files(tmp_path / "bad")
    common = ("--checkpoint", checkpoint, "--device", "cpu", "--batch-size", 2, "--json", "-")
    code, out, err = run(
        capsys, "predict", tmp_path / "bad", photo, tmp_path / "no*.gif", tmp_path / "gone.jpg", *common
    )
    assert code == 1
    record = json.loads(out)  # and nothing else on standard output
    assert [image["file"] for image in record["images"]] == [str(photo)]
    failed = {Path(failure["file"]).name: failure["reason"] for failure in record["failed"]}
    assert set(failed) == {*bad, "no*.gif", "gone.jpg"}
    for name, reason in {**bad, "gone.jpg": "no such file"}.items():
        assert reason in failed[name]
        assert any(name in line and reason in line for line in err.splitlines()), err
    assert "Traceback" not in err

    code, out, err = run(capsys, "predict", tmp_path / "bad", *common)
    assert (code, json.loads(out)["images"]) == (2, [])
    assert {Path(failure["file"]).name for failure in json.loads(out)["failed"]} == set(bad)
    assert "empty.jpg: the file is empty" in err
    code, _, err = run(capsys, "predict", tmp_path / "no*.gif", *common)
    assert code == 2
    assert "no file matches" in err


def test_random_weights_are_warned_of(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(
        capsys, "predict", photo, *SMALL, "--top-k", 2, "--dtype", "bfloat16", "--backend", "reference"
    )
    assert code == 0
    assert "the weights are random and the labels mean nothing" in err
    assert out.count("│") == 2 * 5
    labels = predict._class_names(None, 1000)
    assert labels[0] == "tench, Tinca tinca"
    assert any(label in out for label in labels)


def test_class_names(tmp_path: Path, photo: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat [bold]\ndog\nelk\n\n", encoding="utf-8-sig")
    command = ("predict", photo, "--checkpoint", checkpoint, "--device", "cpu", "--class-names", names)
    code, out, _ = run(capsys, *command)
    assert code == 0
    assert all(name in out for name in ("ant", "bee", "cat [bold]", "dog", "elk"))
    names.write_text("ant\nbee\n")
    code, _, err = run(capsys, *command)
    assert code == 2
    assert "2 names, but the model has 5 classes" in err


def test_grey_model_gets_grey_images(
    tmp_path: Path, photo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "grey.pth"
    model = t2t_fast.create_model("t2t_vit_7", num_classes=3, img_size=64, in_chans=1)
    t2t_fast.save_checkpoint(model.state_dict(), weights)
    seen: list[torch.Size] = []
    original = predict._predict

    def spy(model: t2t_fast.T2TViT, images: torch.Tensor, top_k: int) -> Any:
        seen.append(images.shape)
        return original(model, images, top_k)

    monkeypatch.setattr(predict, "_predict", spy)
    code, _, _ = run(capsys, "predict", photo, "--checkpoint", weights, "--device", "cpu")
    assert code == 0
    assert seen == [(1, 1, 64, 64)]


def test_released_384_weights_are_not_cropped() -> None:
    def resize_to(size: int) -> object:
        with torch.device("meta"):
            model = t2t_fast.create_model("t2t_vit_14", img_size=size)
        transform = predict._transform(model)  # type: ignore[arg-type]
        return transform.transforms[0].size

    assert resize_to(384) == 384
    assert resize_to(224) == 248


def test_batches_are_read_one_ahead_at_most() -> None:
    read_so_far: list[str] = []

    def reading(file: str) -> ImageError:
        read_so_far.append(file)
        return ImageError("")

    files = [str(i) for i in range(10)]
    for i, batch in enumerate(predict.read_batches(files, reading, 3)):
        assert [file for file, _ in batch] == files[3 * i : 3 * i + 3]
        assert len(read_so_far) <= 3 * (i + 2)
    assert sorted(read_so_far) == files


def test_json_file_is_whole_or_absent(
    tmp_path: Path, photo: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out.json"
    target.write_text("old")

    def fail(*args: object) -> None:
        raise OSError("disk full")

    command = ("predict", photo, "--checkpoint", checkpoint, "--device", "cpu", "--json", target)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            run(capsys, *command)
    assert target.read_text() == "old"
    assert run(capsys, *command)[0] == 0
    assert json.loads(target.read_text())["images"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "photo.png"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "resnet50"], "name='resnet50' is no T2T-ViT"),
        (["--checkpoint", "absent.pth"], "absent.pth: no such checkpoint file"),
        (["--checkpoint", "x.pth", "--pretrained"], "two sources of weights"),
        (["--model", "t2t_vit_7", "--img-size", "8"], "img_size must be at least 16"),
        (["--img-size", "1", "2", "3"], "--img-size takes H or H W"),
        (["--json", "absent/out.json"], "absent/out.json: no such folder"),
        (["--device", "nonsense"], "--device nonsense cannot be used here"),
        ([*SMALL, "--class-names", "absent.txt"], "absent.txt: No such file"),
    ],
)
def test_user_errors_are_one_line(
    photo: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    code, out, err = run(capsys, "predict", photo, *argv)
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if "random" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("t2t-fast: error: ")
    assert message in lines[0]


@pytest.mark.parametrize("option", [["--img-size", "64", "x.jpg"], ["--batch-size", "0"], ["--top-k", "-1"]])
def test_bad_numbers_are_refused(photo: Path, capsys: pytest.CaptureFixture[str], option: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["predict", str(photo), *option])
    assert exit_info.value.code == 2
    assert "is not a" in capsys.readouterr().err


def test_interrupt_and_unexpected_errors(
    photo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    def broken(*args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(predict, "find_images", interrupted)
    assert run(capsys, "predict", photo)[0] == 130
    monkeypatch.setattr(predict, "find_images", broken)
    with pytest.raises(ZeroDivisionError):
        run(capsys, "predict", photo)


# The other commands


def test_macs(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "macs", "t2t_vit_1[02]", "resnet18")
    assert code == 0
    assert [name in out for name in ("t2t_vit_10", "t2t_vit_12", "resnet18")] == [True] * 3
    code, out, _ = run(capsys, "macs", "t2t_vit_7", "t2t_vit_14.in1k_384", "--json")
    rows = json.loads(out)
    assert code == 0
    assert [row["image_size"] for row in rows] == [[224, 224], [384, 384]]
    assert [row["published_macs_g"] for row in rows] == [1.1, 17.1]
    assert rows[0]["macs_deviation_percent"] == 4.26
    assert all(0.9 * row["macs"] < row["executed"] < row["macs"] for row in rows)
    code, out, _ = run(capsys, "macs", "t2t_vit_7", "--img-size", "64", "96", "--json")
    assert json.loads(out)[0]["image_size"] == [64, 96]
    assert json.loads(out)[0]["macs_deviation_percent"] is None


def test_macs_failures(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "macs", "t2t_vit_77")
    assert code == 2
    assert "no model matches 't2t_vit_77'; close: t2t_vit_7" in err
    code, out, err = run(capsys, "macs", "levit_128s", "t2t_vit_7", "--img-size", "256")
    assert code == 1
    assert "t2t_vit_7" in out
    assert err.startswith("t2t-fast: levit_128s: cannot be counted: ")
    assert len(err.splitlines()) == 1


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "list")
    assert code == 0
    assert all(name in out for name in VARIANTS)
    code, out, _ = run(capsys, "list", "t2t_vit_t_*", "--json")
    assert [model["name"] for model in json.loads(out)] == ["t2t_vit_t_14", "t2t_vit_t_19", "t2t_vit_t_24"]
    assert json.loads(out)[0]["weights"]["in1k"]["image_size"] == 224
    assert run(capsys, "list", "resnet*")[0] == 2


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "env")
    assert code == 0
    assert torch.__version__ in out
    assert json.loads(run(capsys, "env", "--json")[1])["t2t_fast"] == t2t_fast.__version__


@pytest.mark.parametrize("command", [command.__name__.rpartition(".")[2] for command in COMMANDS])
def test_help_has_examples(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--help"])
    assert exit_info.value.code == 0
    out = capsys.readouterr().out
    assert "examples:" in out
    assert f"t2t-fast {command}" in out.partition("examples:")[2]


def test_module_runs_as_a_program(photo: Path, checkpoint: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "t2t_fast",
        "predict",
        photo,
        photo.parent / "gone.jpg",
        "--checkpoint",
        checkpoint,
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(t2t_fast.__file__).parents[1])}
    done = subprocess.run([*map(str, command), "--json", "-"], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert len(json.loads(done.stdout)["images"]) == 1
    assert done.stderr.splitlines() == [f"t2t-fast: {photo.parent / 'gone.jpg'}: no such file"]
