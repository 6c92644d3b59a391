"""OpenVINO: exported programs, their int8 form, and models that OpenVINO converts itself."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import FAMILIES, quickest, relative_error, seeded_images, small, smallest
from torch import Tensor

import t2t_fast
from t2t_fast import files
from t2t_fast.cli import main
from t2t_fast.deploy import export as module
from t2t_fast.deploy import openvino_ir

openvino = pytest.importorskip("openvino")

every_family = pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)


def run(program: object, images: Tensor) -> Tensor:
    """A program, or the file of one, in float32 also where the CPU has bfloat16."""
    compiled = openvino_ir.engine().compile_model(program, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled(images.numpy())[0].copy())


@every_family
def test_round_trip(name: str, tmp_path: Path) -> None:
    model, path = quickest(name).eval(), tmp_path / "model.xml"
    done = t2t_fast.export(model, path)
    assert {name: done[name] for name in ("format", "checked_by")} == {"format": "openvino", "checked_by": "OpenVINO"}
    assert done["error"] < 5e-6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    assert done["bytes"] == sum(p.stat().st_size for p in tmp_path.iterdir())
    for batch in (1, 2, 9):
        images = seeded_images(batch, 32, 32)
        assert relative_error(run(path, images), model.double()(images.double())) < 5e-6
        model.float()
    program = openvino_ir.engine().read_model(path)
    assert (program.input().any_name, program.output().any_name) == ("images", "logits")
    assert [str(size) for size in program.input().partial_shape] == ["?", "3", "32", "32"]


@every_family
def test_converted_by_openvino(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a trace of a model, or of a frozen one, whose norms have no weights."""
    monkeypatch.setenv("CI", "true")  # its telemetry
    model = smallest(name).eval()
    for traced in (model, t2t_fast.freeze(model)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = openvino.convert_model(traced, example_input=seeded_images(2, 32, 32))
        for batch in (1, 5):
            images = seeded_images(batch, 32, 32)
            assert relative_error(run(program, images), model(images)) < 5e-6


def test_dtypes(tmp_path: Path) -> None:
    model, images = smallest("t2t_vit_7").eval(), seeded_images(3, 32, 32)
    path = tmp_path / "model.xml"
    t2t_fast.export(t2t_fast.freeze(model, torch.float16), path)
    assert openvino_ir.engine().read_model(path).input().element_type == openvino.Type.f16
    assert relative_error(run(path, images.half()), model(images)) < 1e-2
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(t2t_fast.ExportError, match=f"OpenVINO.*float32 or float16.* {dtype}"):
            t2t_fast.export(t2t_fast.freeze(model, dtype), path)


def test_precision_and_threads(tmp_path: Path) -> None:
    """``load`` computes in float32 unless told otherwise; bfloat16 is what CPUs with it would take."""
    model, images = small("t2t_vit_7").eval(), seeded_images(3, 32, 32)
    t2t_fast.export(model, tmp_path / "model.xml")
    plain = module.load(tmp_path / "model.xml", "openvino", threads=1)
    half = module.load(tmp_path / "model.xml", "openvino", precision="bf16")
    assert relative_error(plain(images), model(images)) < 5e-6
    assert relative_error(half(images), model(images)) < 5e-2
    first = plain(images)
    assert not torch.equal(plain(images + 1), first)
    torch.testing.assert_close(plain(images), first)  # results of a call outlive the next


def test_wrong_logits_leave_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for suffix in (".xml", ".bin"):
        (tmp_path / f"model{suffix}").write_text(f"old {suffix}")
    monkeypatch.setattr(module, "_compare", lambda *args: 0.5)
    with pytest.raises(t2t_fast.ExportError, match=r"logits differ by 5\.0e-01"):
        t2t_fast.export(small("t2t_vit_c_14"), tmp_path / "model.xml")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"model.xml": "old .xml", "model.bin": "old .bin"}


@pytest.mark.parametrize("old", [True, False], ids=["old files", "no files"])
@pytest.mark.parametrize("failing", range(4))
def test_both_files_or_none(failing: int, old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever rename fails. Once the weights are in their place, there is no program of other weights beside them."""
    paths = [tmp_path / "model.xml", tmp_path / "model.bin"]
    before = {path.name: f"old {path.name}" for path in paths} if old else {}
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    replace, calls, mixed = os.replace, 0, list[bool]()

    def fail(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == failing + 1:
            raise OSError(errno.EIO, "no luck", str(source))
        replace(source, target)
        texts = [path.read_text().partition(" ")[0] for path in paths if path.exists()]
        mixed.append(len(set(texts)) > 1)

    monkeypatch.setattr(files.os, "replace", fail)
    fails = failing < (4 if old else 2)

    def write() -> None:
        with files.replacing_together(*paths) as temporaries:
            for temporary in temporaries:
                temporary.write_text(f"new {temporary.suffix}")

    if fails:
        with pytest.raises(OSError, match="no luck") as raised:
            write()
        assert raised.value.filename == str(paths[0])
        assert {p.name: p.read_text() for p in tmp_path.iterdir()} == before
    else:
        write()
        assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"model.xml": "new .xml", "model.bin": "new .bin"}
    assert not any(mixed)


def test_targets_that_cannot_be(tmp_path: Path) -> None:
    model = small("t2t_vit_c_14")
    os.mkfifo(tmp_path / "pipe.xml")
    (tmp_path / "folder.bin").mkdir()
    for name, expected in (("pipe.xml", "not a regular file"), ("folder.xml", "folder"), ("none/a.xml", "no such")):
        with pytest.raises(OSError, match=expected):
            t2t_fast.export(model, tmp_path / name)


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_has", lambda name: name not in ("openvino", "nncf"))
    with pytest.raises(t2t_fast.ExportError, match=r"OpenVINO.*pip install openvino$"):
        t2t_fast.export(small("t2t_vit_c_14"), tmp_path / "model.xml")
    with pytest.raises(t2t_fast.ExportError, match=r"int8.*pip install openvino nncf$"):
        module.check_request(tmp_path / "model.xml", None, max_batch=4, int8=True)


def test_arguments_of_int8(tmp_path: Path) -> None:
    for images, error, expected in (
        (seeded_images(99, 4, 4), ValueError, r"images .*at least 100.* got \(99, 3, 4, 4\)"),
        (torch.zeros(100, 3, 4), ValueError, r"images .*got \(100, 3, 4\)"),
        (torch.zeros(100, 3, 4, 4, dtype=torch.uint8), TypeError, "images .*floating-point.* got torch.uint8"),
        ([1.0], TypeError, "images .*got list"),
    ):
        with pytest.raises(error, match=expected):
            t2t_fast.Int8(images)  # type: ignore[arg-type]
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"min_agreement .*0 to 1.* {value}"):
            t2t_fast.Int8(seeded_images(100, 4, 4), value)
    with pytest.raises(TypeError, match=r"min_agreement .*0 to 1, got '0\.9'"):
        t2t_fast.Int8(seeded_images(100, 4, 4), "0.9")  # type: ignore[arg-type]
    int8 = t2t_fast.Int8(seeded_images(100, 4, 4))
    with pytest.raises(ValueError, match=r"int8\.images .*\(N, \*\(3, 32, 32\)\).* got \(100, 3, 4, 4\)"):
        t2t_fast.export(small("t2t_vit_c_14"), tmp_path / "model.xml", int8=int8)
    with pytest.raises(ValueError, match=r"int8 is for format='openvino'.* got format='onnx'"):
        t2t_fast.export(small("t2t_vit_c_14"), tmp_path / "model.onnx", int8=int8)
    half = t2t_fast.freeze(small("t2t_vit_c_14"), torch.bfloat16)
    with pytest.raises(t2t_fast.ExportError, match=r"int8 .*float32.* torch.bfloat16"):
        t2t_fast.export(half, tmp_path / "model.xml", int8=t2t_fast.Int8(seeded_images(100, 32, 32)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [100, 599, 1000])
def test_held_out_images_do_not_calibrate(count: int) -> None:
    images = torch.arange(count, dtype=torch.float32).reshape(-1, 1, 1, 1)
    calibrate, held_out = t2t_fast.Int8(images).split()
    assert len(calibrate) == min(300, count // 2)
    assert sorted(torch.cat((calibrate, held_out)).flatten().tolist()) == list(range(count))
    assert calibrate.flatten().tolist() != list(range(len(calibrate)))  # drawn, as folders are sorted by class


def test_agreement() -> None:
    want = torch.eye(4)
    got = torch.eye(4)
    got[1] = torch.tensor([9.0, 1, 0, 0])
    got[2, 2] = float("nan")
    assert openvino_ir.agreement(want, want) == 1
    assert openvino_ir.agreement(got, want) == 0.5


def is_expanded(value: Any) -> bool:
    return value.get_node().get_type_name() == "Broadcast"


def kinds_before(node: Any) -> set[str]:
    """The types of all nodes that a node's inputs depend on."""
    found, waiting = set[str](), [value.get_node() for value in node.input_values()]
    seen = set[str]()
    while waiting:
        node = waiting.pop()
        if node.get_friendly_name() not in seen:
            seen.add(node.get_friendly_name())
            found.add(node.get_type_name())
            waiting += [value.get_node() for value in node.input_values()]
    return found


def check_int8(name: str, folder: Path) -> None:
    """An int8 program is smaller, near the model, and has its tokens in float32."""
    pytest.importorskip("nncf")
    model, path, images = quickest(name).eval(), folder / "model.xml", seeded_images(100, 32, 32)
    done = t2t_fast.export(model, path, int8=t2t_fast.Int8(images, min_agreement=0.5))
    assert done["held_out"] == 50
    _, held_out = t2t_fast.Int8(images).split()
    got, want = run(path, held_out), model(held_out)
    assert 1e-4 < relative_error(got, want) < 0.2
    assert done["error"] == pytest.approx(relative_error(got, want), rel=1e-2)
    assert done["agreement"] == (got.argmax(1) == want.argmax(1)).double().mean().item() >= 0.5
    operations = openvino_ir.engine().read_model(path).get_ordered_ops()
    kinds = [op.get_type_name() for op in operations]
    assert kinds.count("FakeQuantize") >= 4  # a block's matmuls
    (sequence,) = [op for op in operations if op.get_type_name() == "Concat" and is_expanded(op.input_value(0))]
    assert "FakeQuantize" not in kinds_before(sequence)


def test_int8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Telemetry would begin with files in the home folder; NNCF's process is not told of pytest."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    check_int8("t2t_vit_c_14", tmp_path)
    assert not (tmp_path / "home" / "intel").exists()


def test_imports_are_deferred() -> None:
    code = (
        "import sys, t2t_fast.bench.throughput, t2t_fast.cli\nprint({'nncf', 'openvino', 'onnx'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES.values() if name != "t2t_vit_c_14"])
def test_int8_of_every_family(name: str, tmp_path: Path) -> None:
    check_int8(name, tmp_path)


def test_int8_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where too few top-1 agree: here another model's."""
    model, other, path = smallest("t2t_vit_c_14").eval(), smallest("t2t_vit_c_14").eval(), tmp_path / "model.xml"
    images = seeded_images(100, 32, 32)
    _, held_out = t2t_fast.Int8(images).split()
    rarest = int(model(held_out).argmax(1).bincount(minlength=5).argmin())
    with torch.no_grad():
        other.head.bias[rarest] += 100
    t2t_fast.export(other, tmp_path / "other.xml")
    monkeypatch.setattr(openvino_ir, "quantise", lambda onnx, images: tmp_path / "other.xml")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    share = (model(held_out).argmax(1) == rarest).double().mean().item()
    with pytest.raises(t2t_fast.ExportError, match=rf"on {share:.1%} of 50 held-out images.*min_agreement=98\.0%"):
        t2t_fast.export(model, path, int8=t2t_fast.Int8(images))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_what_nncf_says(tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(openvino_ir.QuantisationFailed, match=r"\w"):
        openvino_ir.quantise(tmp_path / "model.onnx", seeded_images(1, 4, 4))


def write_photographs(folder: Path, count: int) -> None:
    folder.mkdir()
    values = np.random.default_rng(0).integers(0, 255, (count, 40, 50, 3), dtype=np.uint8)
    for i, value in enumerate(values):
        Image.fromarray(value).save(folder / f"{i}.png")


def test_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_photographs(tmp_path / "few", 3)
    (tmp_path / "few" / "broken.jpg").write_bytes(b"no image")
    model = ["--random-weights", "--model", "t2t_vit_7", "--img-size", "32"]
    start = ["export", str(tmp_path / "model.xml"), *model]
    few = ["--calibrate", str(tmp_path / "few")]
    for arguments, expected in (
        (["--int8"], "--int8 needs --calibrate FOLDER"),
        (few, "--calibrate is for --int8"),
        (["--min-agreement", "0.9"], "--min-agreement is for --int8"),
        (["--int8", *few, "--dtype", "bfloat16"], "float32"),
        (["--int8", *few], "3 readable images; needed: at least 100"),
        (["--int8", "--calibrate", str(tmp_path / "none")], "0 readable images"),
    ):
        assert main([*start, *arguments]) == 2
        assert expected in capsys.readouterr().err, arguments
    assert main(["export", str(tmp_path / "model.onnx"), *model, "--int8", *few]) == 2
    assert "int8 is for format='openvino'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*start, "--min-agreement", "2"])
    assert "'2'; accepted: a number from 0 to 1" in capsys.readouterr().err
    (tmp_path / "model.bin").write_text("of somebody else")
    assert main(start) == 2
    assert "model.bin: exists; pass --force" in capsys.readouterr().err


@pytest.mark.slow
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nncf")
    write_photographs(tmp_path / "photographs", 101)
    (tmp_path / "photographs" / "broken.jpg").write_bytes(b"no image")
    start = ["export", str(tmp_path / "model.xml"), "--random-weights", "--model", "t2t_vit_7", "--img-size", "32"]
    assert main(start) == 0
    assert "model.xml: openvino, " in capsys.readouterr().out
    int8 = ["--int8", "--calibrate", str(tmp_path / "photographs"), "--force", "--min-agreement"]
    assert main([*start, *int8, "0"]) == 0
    output = capsys.readouterr()
    assert "model.xml: openvino, int8, " in output.out
    assert "% of 51 held-out images" in output.out
    assert "broken.jpg" in output.err


@pytest.mark.slow
def test_int8_of_a_trained_model(tmp_path: Path) -> None:
    """Handwritten digits: int8 keeps the accuracy."""
    pytest.importorskip("nncf")
    model, images, labels = digits()
    done = t2t_fast.export(model, tmp_path / "model.xml", int8=t2t_fast.Int8(images[:600]))
    assert done["agreement"] >= 0.98
    rest, labels = images[1200:], labels[1200:]
    with torch.no_grad():
        want = model(rest).argmax(1)
    got = run(tmp_path / "model.xml", rest).argmax(1)
    before, after = ((top == labels).double().mean().item() for top in (want, got))
    print(f"accuracy {before:.4f} in float32, {after:.4f} in int8; agreement {done['agreement']:.4f}")
    assert before > 0.9
    assert abs(before - after) < 0.01
    assert (got == want).double().mean() >= 0.98


def digits() -> tuple[torch.nn.Module, Tensor, Tensor]:
    """A T2T-ViT trained for half a minute on the first 1200 of scikit-learn's digits; all 1797 images and labels."""
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    labels = torch.from_numpy(data.target)
    images = torch.nn.functional.interpolate(torch.from_numpy(data.images).float()[:, None] / 8 - 1, size=32)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator)
    images, labels = images[order], labels[order]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = t2t_fast.create_model("t2t_vit_7", img_size=32, in_chans=1, num_classes=10, depth=4).train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=12 * 19)
        for _ in range(12):
            for picked in torch.randperm(1200, generator=generator)[: 19 * 63].split(63):
                shift = torch.randint(-3, 4, (2,), generator=generator).tolist()
                logits = model(images[picked].roll(shift, (2, 3)))
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(logits, labels[picked]).backward()
                optimizer.step()
                rates.step()
    return model.eval(), images, labels
