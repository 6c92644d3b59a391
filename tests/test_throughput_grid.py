"""benchmarks/throughput.py: the grid of sizes, programs kept for all batches, and the rest between runtimes."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_throughput import make_row, read

import t2t_fast
from t2t_fast.bench import measuring, rates, tables, throughput
from t2t_fast.bench.variants import CannotRun, Programs


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's rate is not measured."""
    monkeypatch.setattr(rates, "operations_per_second", lambda dtype, device: 1e11)


def test_the_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All sizes, batches and modes; the slowest cell comes first, and the file has one table."""
    every = throughput.parse_arguments(["--grid"])
    assert (every.models, every.mode) == (["t2t_vit_7", "t2t_vit_14", "t2t_vit_t_14"], ["inference", "training"])
    assert (min(every.img_size), max(every.img_size), every.batch_size) == (32, 384, [1, 2, 16])
    path = tmp_path / "grid.json"
    few = ["--models", "t2t_vit_7", "--img-size", "32", "48", "--batch-size", "1", "2", "--synthetic", "--repeats", "1"]
    assert throughput.main(["--grid", *few, "--device", "cpu", "--no-plot", "--output", str(path)]) == 0
    rows = read(path)["rows"]
    asked = [(mode, size, batch) for mode in ("inference", "training") for size in (32, 48) for batch in (1, 2)]
    found = [(row["mode"], row["img_size"], row["batch_size"]) for row in rows if row["variant"] == "auto"]
    assert found == asked
    speeds = [float(speed) for speed in re.findall(r" (\d+\.\d\d)x ", capsys.readouterr().out)]
    assert len(speeds) == 12  # frozen in inference alone, the reference nowhere
    assert speeds == sorted(speeds)
    table = tables.throughput(read(path))
    assert f"the slowest cell is {min(speeds):.2f}" in table
    (line,) = re.findall(r"\| t2t_vit_7 \| training \| float32 \| auto \| (.*) \|", table)
    wanted = [row["speed"] for row in rows if row["variant"] == "auto" and row["mode"] == "training"]
    assert [float(speed) for speed in re.findall(r"[\d.]+", line)] == [round(speed, 2) for speed in wanted]


def test_programs_are_exported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    exported: list[tuple[str, bool]] = []

    def export(model: Any, path: Path, format: str, *, int8: Any) -> dict[str, Any]:
        exported.append((path.name, int8 is not None))
        if "resnet" in path.name:
            raise t2t_fast.ExportError("no T2T-ViT")
        return {"agreement": 0.5}

    monkeypatch.setattr(t2t_fast, "export", export)
    programs, made = Programs(), torch.nn.Identity
    row, larger = make_row(), make_row(img_size=64)
    first, found = programs.write(row, made, "openvino")
    row.batch_size = 16
    assert programs.write(row, made, "openvino") == (first, found) == (first, {"agreement": 0.5})
    paths = {first, programs.write(row, made, "onnx")[0], programs.write(larger, made, "onnx")[0]}
    paths.add(programs.write(row, made, "openvino", t2t_fast.Int8(torch.zeros(100, 3, 1, 1)))[0])
    assert len(paths) == len(exported) == 4
    assert [int8 for _, int8 in exported] == [False, False, False, True]
    with pytest.raises(CannotRun, match="no T2T-ViT"):
        programs.write(make_row(model="resnet18"), made, "onnx")


def test_runtimes_are_timed_after_a_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, timm, other = (make_row(variant=name) for name in ("auto", None, "openvino"))
    assert not measuring.shares_processor([ours, timm])
    assert measuring.shares_processor([ours, other])
    events: list[str] = []
    clock = itertools.count()
    monkeypatch.setattr(measuring, "REST", 2.5)
    monkeypatch.setattr(measuring.time, "sleep", lambda seconds: events.append(f"rest of {seconds}"))
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: float(next(clock)))
    ours.step = lambda images: events.append("step")
    assert measuring.time_after_rest(ours, torch.zeros(1)) == 1.0
    assert events == ["rest of 2.5", "step", "step", "step"]  # two of them in the 2.5 seconds
