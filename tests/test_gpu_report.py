"""benchmarks/gpu_report.py: the dry run through every stage, time limits, signals, failures, and bad arguments."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from t2t_fast.bench import gpu_report

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
MEASURED = (
    "kernels",
    "throughput",
    "training",
    "latency",
    "compiled",
    "tuning",
    "memory",
    "batches",
    "kernels-compiled",
)


@pytest.mark.slow
def test_dry_run(
    tmp_path: Path,
) -> None:
    """Every stage runs on the CPU and leaves its file."""
    out = tmp_path / "report"
    names = [stage.name for stage in gpu_report.stages(1, "")]
    quick = [name for name in names if name != "tests"]  # those run in this very suite
    command = [sys.executable, str(BENCHMARKS / "gpu_report.py"), "--dry-run", "--out", str(out), "--minutes", "9"]
    done = subprocess.run([*command, "--stages", *quick], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    stages = json.loads((out / "report.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == quick
    assert {stage["status"] for stage in stages} == {"ok"}
    for name in MEASURED:
        assert json.loads((out / f"{name}.json").read_text())["rows"], name
    kept = sorted((out / "results").iterdir())
    assert len(kept) == len(MEASURED)
    kinds = [re.match(r"(kernels|memory|tuning)?", path.name)[0] for path in kept]
    assert kinds == [""] * 5 + ["kernels"] * 2 + ["memory", "tuning"]
    summary = (out / "summary.txt").read_text()
    assert len(summary.splitlines()) < 100
    assert summary in done.stdout
    for text in (
        r"^environment +ok",
        r"^kernels add_layer_norm, 384: aten \d+ µs [\d.]+x floor, training \d+ µs [\d.]+x floor",
        r"^kernels-compiled add_layer_norm, 384: .*reference, compiled \d+ µs",
        r"^throughput t2t_vit_7, 2: reference \d+/s 1.00x; auto \d+/s [\d.]+x$",
        r"^latency t2t_vit_7, 1: reference [\d.]+ ms 1.00x",
        r"^batches t2t_vit_7, 1: ",
        r"^batches t2t_vit_7, 2: ",
        r"^tuning ADD_LAYER_NORM tf32: best ",
        r"^memory t2t_vit_7 auto: \d+ MB",
    ):
        assert re.search(text, summary, re.MULTILINE), f"{text} in {summary}"
    assert "===== kernels: " in (out / "log.txt").read_text()


def stage(name: str, code: str, share: float = 1) -> object:
    command = (sys.executable, "-u", "-c", code)
    return gpu_report.Stage(name, share, command, command)


def test_a_stage_that_hangs_is_cut_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hang = "import signal, time; signal.signal(signal.SIGINT, lambda *a: exit(3)); print('begun'); time.sleep(60)"
    todo = [
        stage("hangs", hang),
        stage("fails", "print('FAILED tests/x.py::y'); exit(7)"),
        stage("works", "print('fine')"),
    ]
    monkeypatch.setattr(gpu_report, "stages", lambda workers, arch: todo)
    monkeypatch.setattr(gpu_report, "collect_env", dict)  # whose first call takes seconds
    started = time.monotonic()
    assert gpu_report.main(["--out", str(tmp_path), "--dry-run", "--minutes", "0.25"]) == 1
    assert time.monotonic() - started < 15
    status = {s["stage"]: s["status"] for s in json.loads((tmp_path / "report.json").read_text())["stages"]}
    assert status == {"hangs": "cut after 3 s", "fails": "exit status 7", "works": "ok"}
    summary = (tmp_path / "summary.txt").read_text()
    assert "begun" in summary
    assert "FAILED tests/x.py::y" in summary
    assert "fine" in summary


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_stage_and_keeps_what_is_known(tmp_path: Path, number: signal.Signals) -> None:
    """Of the process, and of what its stage has started, nothing stays; the files are whole."""
    child = f"""
        import pathlib, signal, subprocess, sys, time
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, signal.SIG_IGN)
        grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        pathlib.Path({str(tmp_path)!r}, "pid").write_text(f"{{grandchild.pid}}\\n")
        time.sleep(60)"""
    script = f"""
        import sys
        from t2t_fast.bench import gpu_report
        def stage(name, code):
            return gpu_report.Stage(name, 1, (), (sys.executable, "-c", code))
        todo = [stage("quick", "print('fine')"), stage("hangs", {textwrap.dedent(child)!r}), stage("later", "")]
        gpu_report.stages = lambda workers, arch: todo
        gpu_report.collect_env = dict
        sys.exit(gpu_report.main(["--out", {str(tmp_path)!r}, "--dry-run", "--minutes", "2"]))"""
    command = [sys.executable, "-c", textwrap.dedent(script)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pid = tmp_path / "pid"
    deadline = time.monotonic() + 60
    while not (pid.is_file() and pid.read_text().endswith("\n")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err == ""
    status = {s["stage"]: s["status"] for s in json.loads((tmp_path / "report.json").read_text())["stages"]}
    assert status == {"quick": "ok", "hangs": "interrupted"}
    assert re.search(r"^hangs +interrupted", (tmp_path / "summary.txt").read_text(), re.MULTILINE)
    assert "fine" in out
    deadline = time.monotonic() + 10
    while is_running(int(pid.read_text())):
        assert time.monotonic() < deadline, "the stage's own child goes on"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """A zombie that nobody has waited for is not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def a_result(kind: str, **more: Any) -> str:
    """A result file of that benchmark, as text."""
    environment = {"torch": "2.14.1+cu130", "triton": "3.8.0"}
    date = "2026-11-25T10:20:30+00:00"
    content = {"benchmark": kind, "hardware": "NVIDIA H100 80GB HBM3", "date": date, "environment": environment}
    return json.dumps({**content, "rows": [], **more})


def test_results_get_their_proper_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole ones alone: what was cut, and what is no result, stays where it is."""
    files = {
        "whole": (a_result("throughput", complete=True), 0),
        "wrong": (a_result("throughput", complete=True, date="2026-11-25T10:20:31+00:00"), 1),
        "partial": (a_result("throughput", complete=False, date="2026-11-25T10:20:32+00:00"), 0),
        "kernels": (a_result("kernels", work={}), 0),
        "failed": (a_result("memory"), 1),
        "other": ('{"rows": []}', 0),
    }
    code = "import pathlib; pathlib.Path({path!r}).write_text({text!r}); exit({status})"
    todo = [
        stage(name, code.format(path=str(tmp_path / f"{name}.json"), text=text, status=status))
        for name, (text, status) in files.items()
    ]
    monkeypatch.setattr(gpu_report, "stages", lambda workers, arch: todo)
    monkeypatch.setattr(gpu_report, "collect_env", dict)
    assert gpu_report.main(["--out", str(tmp_path), "--dry-run"]) == 1
    names = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert names == [
        "kernels-nvidia-h100-80gb-hbm3_torch2.14.1_triton3.8.0_20261125-102030.json",
        "nvidia-h100-80gb-hbm3_torch2.14.1_triton3.8.0_20261125-102030.json",
        "nvidia-h100-80gb-hbm3_torch2.14.1_triton3.8.0_20261125-102031.json",
    ]
    assert (tmp_path / "results" / names[1]).read_text() == files["whole"][0]
    last = (tmp_path / "summary.txt").read_text().splitlines()[-1]
    assert f"{tmp_path}/results/*.json" in last and "benchmarks/report.py" in last


def test_an_earlier_report_is_not_taken_for_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(model: str, hour: int) -> str:
        row = {"table": model, "kind": "half", "best": 1.0, "failed": {}, "tried": 3, "status": "ok"}
        return a_result("tuning", rows=[row], date=f"2026-11-25T{hour}:20:30+00:00")

    results = tmp_path / "results"
    results.mkdir()
    name = "tuning-nvidia-h100-80gb-hbm3_torch2.14.1_triton3.8.0_20261125-{}2030.json"
    for index, which in enumerate(("tuning", "unasked")):
        (tmp_path / f"{which}.json").write_text(of(f"OLD_{which.upper()}", 10 + index))
        (results / name.format(10 + index)).write_text(of(f"OLD_{which.upper()}", 10 + index))
    for kept in ("summary.txt", "report.json"):
        (tmp_path / kept).write_text("old")
    todo = [stage("tuning", "exit(1)"), stage("unasked", "")]
    monkeypatch.setattr(gpu_report, "stages", lambda workers, arch: todo)
    monkeypatch.setattr(gpu_report, "collect_env", dict)
    assert gpu_report.main(["--out", str(tmp_path), "--dry-run", "--stages", "tuning"]) == 1
    assert not (tmp_path / "tuning.json").exists()
    assert "OLD" not in (tmp_path / "summary.txt").read_text()
    assert (tmp_path / "unasked.json").exists()  # of a stage that was not asked for: neither shown nor lost
    assert [path.name for path in results.iterdir()] == [name.format(11)]


def test_what_is_not_installed_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report.shutil, "which", lambda *a, **k: None)
    (memcheck,) = (stage for stage in gpu_report.stages(1, "9.0") if stage.name == "memcheck")
    missing = gpu_report.Stage("memcheck", 1, (), ("no-such-program-here", *memcheck.command[1:]))
    assert memcheck.command[0] == "compute-sanitizer"
    monkeypatch.setattr(gpu_report, "stages", lambda workers, arch: [missing])
    monkeypatch.setattr(gpu_report, "collect_env", dict)
    assert gpu_report.main(["--out", str(tmp_path), "--dry-run"]) == 0
    (line,) = json.loads((tmp_path / "report.json").read_text())["stages"]
    assert line["status"] == "skipped: no-such-program-here is not installed"


def test_the_summary_stays_short(tmp_path: Path) -> None:
    output = [*[f"SKIPPED [1] tests/x.py:{i}: none" for i in range(9)], *[f"FAILED tests/x.py::y{i}" for i in range(3)]]
    results = [{"stage": f"s{i}", "status": "ok", "seconds": 1.0, "output": output} for i in range(20)]
    lines = gpu_report.summarise(results, tmp_path)
    assert len(lines) == gpu_report.LINES
    assert "more lines in the files" in lines[-2]
    assert "results/*.json" in lines[-1]
    assert lines[20].strip() == "FAILED tests/x.py::y0"  # before the skips
    assert lines[26].strip() == "... and 6 more in log.txt"


def test_kernels_in_the_summary(tmp_path: Path) -> None:
    parts = {part: {"floor_s": floor} for part, floor in (("forward", 1e-4), ("training", 3e-4))}
    times = {"reference": (9e-4, 9e-4), "aten": (4e-4, 6e-4), "triton": (1.5e-4, 4.5e-4)}
    rows: list[dict[str, Any]] = [
        {"op": "mlp", "use": "384", "variant": v, "status": "ok", "forward_s": f, "training_s": t}
        for v, (f, t) in times.items()
    ]
    rows.append({"op": "mlp", "use": "384", "variant": "native", "status": "wrong: 3.0e-01"})
    (tmp_path / "kernels.json").write_text(a_result("kernels", work={"mlp, 384": parts}, rows=rows))
    result = {"stage": "kernels", "status": "ok", "seconds": 1.0, "output": []}
    assert gpu_report.summarise([result], tmp_path)[1] == (
        "kernels mlp, 384: aten 400 µs 4.00x floor, training 600 µs 2.00x floor; "
        "triton 150 µs 1.50x floor, training 450 µs 1.50x floor; native wrong: 3.0e-01"
    )


def test_the_gpu_tests_are_named() -> None:
    tests = Path(__file__).parent
    marked = [path.name for path in sorted(tests.glob("test_*.py")) if re.search(r"mark\.gpu\b", path.read_text())]
    assert list(gpu_report.GPU_TESTS) == [f"tests/{name}" for name in marked]
    (stage,) = (stage for stage in gpu_report.stages(4, "9.0") if stage.name == "tests")
    assert {"--continue-on-collection-errors", "-rfEs", *gpu_report.GPU_TESTS} <= set(stage.command)
    assert "tests" not in stage.command


def test_sixteen_bits_are_tested_first() -> None:
    import test_gpu

    marks = [mark.args for mark in test_gpu.test_against_float64.pytestmark if mark.name == "parametrize"]
    assert marks[0] == ("precision", ["bfloat16", "float16", "tf32", "float32"])  # the first one varies slowest


def test_files_are_collected_without_their_packages() -> None:
    """`pytest tests` goes on where a package is missing that only some of its files need."""
    code = """
        import sys
        sys.modules |= dict.fromkeys(("onnx", "onnxruntime", "sklearn", "sklearn.datasets"))
        import pytest
        files = ["tests/test_export.py", "tests/test_training.py", "tests/test_memory.py"]
        sys.exit(pytest.main(["-q", "--collect-only", "-p", "no:cacheprovider", *files]))"""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_memory.py" in done.stdout and "test_export.py" not in done.stdout


def test_stages_in_order_of_worth() -> None:
    stages = gpu_report.stages(4, "9.0")
    names = [stage.name for stage in stages]
    assert " ".join(names) == (
        "environment build tests ops kernels throughput training latency compiled tuning memory batches memcheck "
        "racecheck kernels-compiled"
    )
    shares = [stage.share for stage in stages]
    assert (9 * 60 - 5) * shares[1] / sum(shares) > 48  # 90 s of compilation on one core
    for stage in stages:
        written = [
            command[command.index("--output") + 1] for command in (stage.command, stage.dry) if "--output" in command
        ]
        assert written == ([f"{{out}}/{stage.name}.json"] * 2 if stage.name in MEASURED else [])
    commands = {stage.name: stage.command for stage in stages}
    assert "--no-compile" in commands["kernels"]
    assert "--no-compile" not in commands["kernels-compiled"]


def test_every_command_names_files_that_exist() -> None:
    for stage in gpu_report.stages(4, "9.0"):
        for part in (*stage.command, *stage.dry):
            if part.endswith(".py"):
                assert (BENCHMARKS.parent / part).is_file(), part


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
