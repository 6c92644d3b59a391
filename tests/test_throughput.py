"""benchmarks/throughput.py: the table, the result file, the gate on wrong logits, and the answers to bad arguments."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
TINY = ["--device", "cpu", "--img-size", "64", "--batch-size", "2", "--repeats", "2"]


@pytest.fixture
def throughput(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import throughput

    return throughput


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_script(tmp_path: Path) -> None:
    """As a user runs it: table and legend on stdout, the whole measurement in a file named by the hardware."""
    command = [sys.executable, str(BENCHMARKS / "throughput.py"), *TINY, "--output", str(tmp_path), "--models"]
    command += ["t2t_vit_7", "resnet18"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert run.returncode == 0, run.stderr
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("cpu-")
    assert f"_torch{torch.__version__.partition('+')[0]}_" in path.name

    result = read(path)
    assert result["passed"] is True
    assert (result["device"], result["dtype"], result["batch_size"], result["img_size"]) == ("cpu", "float32", 2, 64)
    assert "china.jpg" in result["images"]
    assert result["environment"]["torch"] == str(torch.__version__)
    assert "git" in result["environment"]
    assert "--models t2t_vit_7 resnet18" in result["command"]
    rows = result["rows"]
    assert [(row["model"], row["backend"]) for row in rows] == [
        ("t2t_vit_7", "reference"),
        ("t2t_vit_7", "auto"),
        ("resnet18", None),
    ]
    for row in rows:
        assert len(row["seconds"]) == 2
        assert row["images_per_second"] > 0
        assert row["speed"] > 0
        assert (row["error"] is None) == (row["backend"] is None)
    assert result["baseline"] == "t2t_vit_7 reference"
    assert rows[0]["speed"] == 1.0
    assert rows[0]["ops"]["soft_split_linear"] == ["reference"]
    assert rows[2]["params"] == 11689512

    lines = [line.split() for line in run.stdout.splitlines()]
    assert ["t2t_vit_7", "reference"] in [line[:2] for line in lines]
    assert ["resnet18", "-", "11.7"] in [line[:3] for line in lines]
    assert "1.00x" in run.stdout
    assert f"accepted up to {result['tolerance']:.0e}" in run.stdout
    assert run.stdout.rstrip().endswith(str(path))


@pytest.mark.parametrize("value", [2.0, float("nan")])
def test_wrong_logits_have_no_speed(
    throughput: ModuleType,
    value: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import _measure

    build_rows = _measure.build_rows

    def build_wrong_row(*args: Any) -> list[Any]:
        rows = build_rows(*args)
        with torch.no_grad():
            rows[1].module.get_parameter("blocks.3.norm1.bias")[5] = value
        return rows

    monkeypatch.setattr(_measure, "build_rows", build_wrong_row)
    path = tmp_path / "wrong.json"
    assert throughput.main([*TINY, "--models", "t2t_vit_7", "--synthetic", "--output", str(path)]) == 1
    result = read(path)
    assert result["passed"] is False
    good, wrong = result["rows"]
    assert good["passed"] is True
    assert good["images_per_second"] > 0
    assert wrong["passed"] is False
    assert wrong["seconds"] == []
    assert wrong["images_per_second"] is wrong["speed"] is None
    output = capsys.readouterr().out
    assert "WRONG: t2t_vit_7 with backend auto" in output
    row = next(line.split() for line in output.splitlines() if line.split()[:2] == ["t2t_vit_7", "auto"])
    assert row[4:7] == ["wrong", "-", "-"]


def test_every_parameter_counts(throughput: ModuleType) -> None:
    """The random weights let no parameter hide from the gate."""
    import _measure

    (row,) = _measure.build_rows("t2t_vit_7", ["aten"], 64, 0)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = row.module(images)
        for name, parameter in row.module.named_parameters():
            saved = parameter.clone()
            parameter.zero_()
            error = (row.module(images) - expected).norm() / expected.norm()
            assert error > 1e-3, name
            parameter.copy_(saved)


def test_time_budget(throughput: ModuleType) -> None:
    import _measure

    def rows() -> list[Any]:
        return [_measure.Row("m", None, torch.nn.Identity(), 0, 0) for _ in range(3)]

    images = torch.zeros(1)
    for budget, rounds in ((1e-9, _measure.MIN_REPEATS), (60.0, _measure.MAX_REPEATS)):
        timed = rows()
        reports: list[tuple[int, int]] = []
        _measure.time_rows(timed, images, None, budget, lambda *report: reports.append(report))  # noqa: B023
        assert [len(row.times) for row in timed] == [rounds] * 3
        assert reports[-1] == (3 * rounds, 3 * rounds)


def test_folder_of_images(throughput: ModuleType, tmp_path: Path) -> None:
    from _images import load_images

    nested = tmp_path / "class"
    nested.mkdir()
    Image.new("RGB", (80, 50), "red").save(nested / "a.JPG", format="jpeg")
    Image.new("RGBA", (30, 90)).save(nested / "b.png")
    Image.new("L", (1, 1)).save(tmp_path / "c.png")
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    (tmp_path / "notes.txt").write_text("ignored")
    images, origin = load_images(tmp_path, False, 5, 32, seed=0)
    assert images.shape == (5, 3, 32, 32)
    assert images.isfinite().all()
    assert "3 images" in origin
    assert "1 unreadable" in origin
    assert torch.equal(images, load_images(tmp_path, False, 5, 32, seed=0)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "t2t_vit_77"], r"--models: 't2t_vit_77' is unknown; .*did you mean t2t_vit_7"),
        (["--batch-size", "0"], r"--batch-size: got '0'; accepted: a whole number of at least 1"),
        (["--time-budget", "nan"], r"--time-budget: got 'nan'; accepted: a number of seconds above 0"),
        (["--dtype", "float8"], r"--dtype: invalid choice: 'float8' \(choose from .*bfloat16"),
        (["--backends", "cudnn"], r"--backends: invalid choice: 'cudnn' \(choose from .*reference"),
        (["--images", "no/such/folder"], r"--images: 'no/such/folder' is no folder"),
        (["--images", "empty"], r"--images: 'empty' holds none; accepted: \.jpg"),
        (["--img-size", "4"], r"--img-size: got 4, which t2t_vit_14 does not take: .*at least 16"),
        (["--output", "file/result.json"], r"--output: file cannot be written to"),
        pytest.param(
            ["--device", "cuda"],
            r"--device: 'cuda' cannot be used by this torch here; accepted: auto, cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_arguments(
    throughput: ModuleType,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line on stderr, exit status 2, and no file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    output = [] if "--output" in arguments else ["--output", "empty"]
    try:
        status = throughput.main([*arguments, *output])
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("throughput.py: error: ")
    assert re.search(message, line), line
    assert list((tmp_path / "empty").iterdir()) == []


def test_result_files_are_whole_or_absent(throughput: ModuleType, tmp_path: Path) -> None:
    from _common import write_json

    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read(path) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
