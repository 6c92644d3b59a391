"""benchmarks/scaling.py: the cost model against counts by hand, and the page against the script."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from t2t_fast.bench import scaling
from t2t_fast.macs import Macs

ROOT = Path(__file__).resolve().parents[1]
FILE = re.compile(r"Measured on one .*; \[(.+?)\]")


def machine(**changes: Any) -> Any:
    given = {
        "flops": 1e15,
        "efficiency": 0.5,
        "bandwidth": 1e15,
        "node": 8,
        "link": 1e11,
        "network": 1e10,
        "latency": 0.0,
        "overlap": 0.0,
    }
    return scaling.Machine(**{**given, **changes})


def test_all_reduce() -> None:
    size = 8e8
    assert scaling.all_reduce(size, 1, machine()) == 0
    assert scaling.all_reduce(size, 8, machine()) == pytest.approx(2 * 7 / 8 * 8e8 / 1e11)
    inside = scaling.all_reduce(size, 8, machine())
    assert scaling.all_reduce(size, 16, machine()) == pytest.approx(inside + 2 * 1 / 2 * 1e8 / 1e10)
    assert scaling.all_reduce(0, 64, machine(latency=1e-6)) == pytest.approx((2 * 7 + 2 * 7) * 1e-6)


def test_a_step() -> None:
    cost = Macs(params=10**7, macs=10**9, activations=10**7)
    step = scaling.step(cost, 100, 8, machine(), None)
    assert step.compute == step.arithmetic == pytest.approx(100 * 6e9 / 5e14)
    assert step.exposed == step.all_reduce
    assert step.seconds == step.compute + step.all_reduce
    slow = scaling.step(cost, 100, 8, machine(bandwidth=1e10), None)
    assert slow.compute == slow.memory == pytest.approx((100 * 2 * 5 * 1e7 + 7 * 4e7) / 1e10)
    assert scaling.step(cost, 100, 8, machine(bandwidth=1.0), 50.0).compute == 2.0
    hidden = scaling.step(cost, 100, 8, machine(overlap=1.0), None)
    assert hidden.exposed == pytest.approx(max(0.0, hidden.all_reduce - hidden.compute * 2 / 3))


def training_file(path: Path, **changes: Any) -> Path:
    row = {"model": "t2t_vit_14", "mode": "training", "precision": "bfloat16", "img_size": 224}
    rows = [
        row | {"variant": variant, "batch_size": batch, "img_size": size, "status": status, "images_per_second": rate}
        for variant, batch, size, rate, status in (
            ("auto", 128, 224, 2000.0, "ok"),
            ("auto", 128, 224, 2560.0, "ok"),
            ("auto", 128, 224, 9000.0, "wrong"),
            ("reference", 128, 224, 2700.0, "ok"),
            ("auto", 512, 224, 3000.0, "ok"),
            ("auto", 128, 112, 8000.0, "ok"),
        )
    ]
    path.write_text(json.dumps({"device": "cuda", "hardware": "NVIDIA X", "rows": rows} | changes))
    return path


def test_measured_speeds_of_one_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = training_file(tmp_path / "gpu.json")
    assert scaling.main(["--result", str(path)]) == 0
    text = capsys.readouterr().out
    rows = {tuple(cells[:2]): cells for cells in ([c.strip() for c in row.split("|")[1:]] for row in text.splitlines())}
    assert rows["t2t_vit_14", "8"][3:5] == ["50.00", "0.00"]  # 128 images at 2560 per second
    assert rows["t2t_vit_19", "8"][3] == "26.34"  # computed
    measured = "images per second: t2t_vit_14 2560 (auto, bfloat16, batches of 128); gpu.json."
    assert f"Measured on one NVIDIA X, {measured}" in text
    assert scaling.main(["--result", str(path), "--batch-size", "512"]) == 0
    assert "t2t_vit_14 3000 (auto, bfloat16, batches of 512)" in capsys.readouterr().out


def test_the_page_with_a_measured_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    page = tmp_path / "docs" / "scaling.md"
    page.parent.mkdir()
    page.write_text("before\n<!-- computed -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(scaling, "checkout", lambda: tmp_path)
    assert scaling.main(["--result", str(training_file(results / "gpu.json")), "--write"]) == 0
    text = page.read_text()
    assert "; [gpu.json](../benchmarks/results/gpu.json)." in text
    assert FILE.findall(text) == ["gpu.json"]
    assert scaling.main(["--write"]) == 0
    assert "Measured" not in page.read_text() and "old" not in page.read_text()


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for changes, message in (
        ({"device": "cpu"}, "was measured on 'cpu'; pass a GPU's training file"),
        ({"rows": []}, "has no training speed of t2t_vit_14"),
        ({"rows": [1]}, "is no file of throughput.py"),
        ({"rows": [{"model": "t2t_vit_14", "mode": "training", "img_size": 224}]}, "is no file of throughput.py"),
        ({"with_loader": True}, "was measured with its loader"),
    ):
        assert scaling.main(["--result", str(training_file(tmp_path / "x.json", **changes))]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    for arguments, message in (
        (["--overlap", "3"], "--overlap: got '3'; accepted: a number above 0, at most 1"),
        (["--link", "fast"], "--link: got 'fast'; accepted: a number above 0"),
    ):
        with pytest.raises(SystemExit) as exit:
            scaling.main(arguments)
        assert exit.value.code == 2
        assert message in capsys.readouterr().err


def test_the_page_is_what_the_script_computes(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "scaling.md").read_text()
    files = FILE.findall(page)
    assert scaling.main(["--result", str(ROOT / "benchmarks" / "results" / files[0])] if files else []) == 0
    assert capsys.readouterr().out.strip() in page
