"""benchmarks/report.py: docs and committed files agree, and files of every kind and age become tables and plots."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from t2t_fast.bench import report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def test_docs_agree_with_the_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_every_committed_file_is_shown() -> None:
    text = (ROOT / "docs" / "results.md").read_text()
    for path in RESULTS.glob("*.json"):
        assert path.name in text, f"{path.name} is superseded by a newer file: remove it"


def test_every_picture_exists() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text()):
            assert (page.parent / name).is_file(), f"{page.name}: {name} is missing: run python benchmarks/report.py"


def test_a_changed_figure_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("benchmarks/results", "docs"):
        (tmp_path / name).mkdir(parents=True)
    pages = (ROOT / name for name in report.DOCS)
    for path in [*RESULTS.glob("*.json"), ROOT / "benchmarks" / "resources.json", *pages]:
        (tmp_path / path.relative_to(ROOT)).write_text(path.read_text())
    monkeypatch.setattr(report, "checkout", lambda: tmp_path)
    assert report.main(["--check"]) == 0
    path = next(p for p in (tmp_path / "benchmarks/results").glob("cpu-amd*.json"))
    result = json.loads(path.read_text())
    for row in result["rows"]:
        if row["images_per_second"]:
            row["images_per_second"] *= 1.5
    path.write_text(json.dumps(result))
    assert report.main(["--check"]) == 1
    assert report.main([]) == 0
    assert report.main(["--check"]) == 0
    assert list((tmp_path / "docs").glob("*.svg"))


def gpu_file(**changes: Any) -> dict[str, Any]:
    """A made-up file of a GPU with a sweep over batches, a row that failed and the paper's models."""
    rows = [
        {
            "model": model,
            "variant": variant,
            "mode": "inference",
            "precision": "bfloat16",
            "batch_size": batch,
            "img_size": 224,
            "macs": 5e9,
            "params": 2e7,
            "status": "ok",
            "error": 1e-3,
            "seconds": [0.1, 0.11, 0.1],
            "images_per_second": batch * 10.0,
            "spread": 1.0,
            "speed": 2.0,
        }
        for model in ("t2t_vit_7", "t2t_vit_14", "t2t_vit_24")
        for variant in ("reference", "auto")
        for batch in (8, 32, 128)
    ]
    rows[0] |= {"status": "out of memory", "seconds": [], "images_per_second": None, "spread": None, "speed": None}
    environment = {"torch": "2.11", "git": {"commit": "a" * 40, "dirty": False}, "cpu": {"torch_threads": 8}}
    content = {"benchmark": "throughput", "date": "2026-01-01", "device": "cuda", "hardware": "NVIDIA X", "rows": rows}
    return content | {"command": "python benchmarks/throughput.py", "environment": environment} | changes


def test_gpu_tables_and_plots_appear_with_a_file(tmp_path: Path) -> None:
    assert report.blocks([])["gpu"] == report.blocks([])["measured"] == "Not measured yet."
    (tmp_path / "a.json").write_text(json.dumps(gpu_file()))
    (tmp_path / "b.json").write_text(json.dumps(gpu_file(date="2026-02-01")))
    files = report.load(tmp_path)
    assert [path.name for path, _ in files] == ["b.json"]  # the newer of the same command
    blocks = report.blocks(files)
    assert "### NVIDIA X" in blocks["gpu"]
    assert "| t2t_vit_7 | reference | 5.0 | out of memory |" in blocks["gpu"]
    assert "| t2t_vit_14 | auto | 5.0 | 1280 ± 0.1% | 2.00x |" in blocks["gpu"]
    assert "[inference, bfloat16, batch 128](benchmarks/results/b.json) | 1280 | 1280 |" in blocks["measured"]
    first = {p.name: p.read_bytes() for p in report.draw(files, tmp_path)}
    assert {name.partition("-")[0] for name in first} == {"throughput", "top1", "batches"}
    second = {p.name: p.read_bytes() for p in report.draw(files, tmp_path)}
    assert first == second  # drawn twice, the same bytes


def test_the_readme_shows_the_newest_run(tmp_path: Path) -> None:
    """Of one machine, mode, precision and batch, whatever else the commands ask for; decoding is another thing."""
    (tmp_path / "new.json").write_text(json.dumps(gpu_file(date="2026-02-01", command="x --models paper")))
    (tmp_path / "old.json").write_text(json.dumps(gpu_file()))
    loader = gpu_file(date="2026-03-01", command="x --with-loader", with_loader=True)
    (tmp_path / "loader.json").write_text(json.dumps(loader))
    measured = report.blocks(report.load(tmp_path))["measured"]
    assert measured.count("[inference, bfloat16, batch 128]") == 1
    assert "new.json" in measured and "old.json" not in measured and "loader.json" not in measured


def test_the_best_of_the_others(tmp_path: Path) -> None:
    """Other runtimes' programs in the row's own arithmetic: bfloat16 is no match for float32, nor int8 for either."""
    row = {
        "model": "t2t_vit_14",
        "mode": "inference",
        "batch_size": 16,
        "img_size": 224,
        "macs": 5e9,
        "status": "ok",
        "error": 1e-3,
        "seconds": [0.1],
        "spread": None,
        "speed": 2.0,
    }
    speeds = {
        "reference": 10.0,
        "auto": 90.0,
        "onnx": 30.0,
        "openvino": 40.0,
        "openvino-bf16": 50.0,
        "openvino-int8": 60.0,
    }
    rows = [
        row | {"variant": variant, "precision": precision, "images_per_second": speed}
        for variant, speed in speeds.items()
        for precision in ("float32", "bfloat16")
        if precision == "float32" or variant not in ("onnx", "openvino")
    ]
    (tmp_path / "a.json").write_text(json.dumps(gpu_file(rows=rows)))
    measured = report.blocks(report.load(tmp_path))["measured"]
    assert re.search(r"float32, batch 16.*\| 40\.0 \(openvino\) \|$", measured, re.MULTILINE)
    assert re.search(r"bfloat16, batch 16.*\| 50\.0 \(openvino-bf16\) \|$", measured, re.MULTILINE)


def test_a_tuning_file_is_shown(tmp_path: Path) -> None:
    config = {"blocks": {"BLOCK_M": 64, "BLOCK_N": 32}, "num_warps": 8, "num_stages": 3}
    row = {"table": "ADD_LAYER_NORM", "kind": "half", "tried": 5, "failed": {"c": "too large"}}
    rows = [
        row | {"status": "ok", "best": 0.9, "best_index": 1, "candidates": [{"config": {}}, {"config": config}]},
        row | {"status": "shipped configuration: no", "best": None, "best_index": 0, "candidates": [{"config": {}}]},
    ]
    (tmp_path / "tuning.json").write_text(json.dumps(gpu_file(benchmark="tuning", rows=rows)))
    text = report.blocks(report.load(tmp_path))["gpu"]
    assert "| ADD_LAYER_NORM | half | 5 | 1 | 0.900 | m 64, n 32 | 8, 3 |" in text
    assert "| ADD_LAYER_NORM | half | 5 | 1 | shipped configuration: no |  |  |" in text


def test_what_is_no_result_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(report.UsageError, match=r"x\.json is no result file"):
        report.load(tmp_path)
    with pytest.raises(report.UsageError, match="there is no generated block 'nothing'"):
        report.fill("<!-- generated: nothing -->\n<!-- end -->", {})
