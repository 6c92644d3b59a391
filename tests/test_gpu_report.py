"""benchmarks/gpu_report.py: the dry run through every stage, time limits, failures, and bad arguments."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def gpu_report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_report

    return gpu_report


@pytest.mark.slow
def test_dry_run(tmp_path: Path, gpu_report: ModuleType) -> None:
    """Every stage runs on the CPU and leaves its file."""
    out = tmp_path / "report"
    names = [stage.name for stage in gpu_report.stages(1, "")]
    quick = [name for name in names if name != "tests"]  # those run in this very suite
    command = [sys.executable, str(BENCHMARKS / "gpu_report.py"), "--dry-run", "--out", str(out), "--minutes", "5"]
    done = subprocess.run([*command, "--stages", *quick], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    stages = json.loads((out / "report.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == quick
    assert {stage["status"] for stage in stages} == {"ok"}
    for name in ("kernels", "throughput", "training", "compiled", "tuning", "memory"):
        assert json.loads((out / f"{name}.json").read_text())["rows"], name
    summary = (out / "summary.txt").read_text()
    assert len(summary.splitlines()) < 100
    assert summary in done.stdout
    for text in ("environment  ok", "kernel add_layer_norm", "throughput t2t_vit_7 auto: ", "memory t2t_vit_7 auto: "):
        assert text in summary
    assert "===== kernels: " in (out / "log.txt").read_text()


def stage(gpu_report: ModuleType, name: str, code: str, share: float = 1) -> object:
    command = (sys.executable, "-u", "-c", code)
    return gpu_report.Stage(name, share, command, command)


def test_a_stage_that_hangs_is_cut_and_the_others_run(
    gpu_report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang = "import signal, time; signal.signal(signal.SIGINT, lambda *a: exit(3)); print('begun'); time.sleep(60)"
    todo = [
        stage(gpu_report, "hangs", hang),
        stage(gpu_report, "fails", "print('FAILED tests/x.py::y'); exit(7)"),
        stage(gpu_report, "works", "print('fine')"),
    ]
    monkeypatch.setattr(gpu_report, "stages", lambda workers, arch: todo)
    started = time.monotonic()
    assert gpu_report.main(["--out", str(tmp_path), "--dry-run", "--minutes", "0.25"]) == 1
    assert time.monotonic() - started < 15
    status = {s["stage"]: s["status"] for s in json.loads((tmp_path / "report.json").read_text())["stages"]}
    assert status == {"hangs": "cut after 3 s", "fails": "exit status 7", "works": "ok"}
    summary = (tmp_path / "summary.txt").read_text()
    assert "begun" in summary
    assert "FAILED tests/x.py::y" in summary
    assert "fine" in summary


def test_the_summary_stays_short(gpu_report: ModuleType, tmp_path: Path) -> None:
    output = [f"FAILED tests/x.py::y{i}" for i in range(500)]
    results = [{"stage": f"s{i}", "status": "ok", "seconds": 1.0, "output": output} for i in range(12)]
    lines = gpu_report.summarise(results, tmp_path)
    assert len(lines) == gpu_report.LINES
    assert "more lines in the files" in lines[-1]


def test_every_command_names_files_that_exist(gpu_report: ModuleType) -> None:
    for stage in gpu_report.stages(4, "9.0"):
        for part in (*stage.command, *stage.dry):
            if part.endswith(".py"):
                assert (BENCHMARKS.parent / part).is_file(), part


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bad_arguments(gpu_report: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for arguments, message in (
        (["--out", str(tmp_path)], "there is no CUDA device; --dry-run walks through all stages"),
        (["--out", str(tmp_path / "file"), "--dry-run"], "cannot be written to"),
        (["--out", str(tmp_path), "--minutes", "0"], "--minutes: got '0'"),
        (["--out", str(tmp_path), "--stages", "speed"], "--stages: invalid choice: 'speed'"),
    ):
        with pytest.raises(SystemExit) as exit:
            gpu_report.main(arguments)
        assert exit.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
