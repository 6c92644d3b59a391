"""t2t_fast.bench as a package: its scripts, its place among the others, and what it does without."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from t2t_fast.bench import common
from t2t_fast.checks import UsageError

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if path.name != "test_ops.py"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_runs_the_module_of_its_name(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its usage names the script."""
    assert f'"-m", "t2t_fast.bench.{path.stem}", *sys.argv[1:]' in path.read_text()
    module = importlib.import_module(f"t2t_fast.bench.{path.stem}")
    with pytest.raises(SystemExit) as exit:
        module.main(["--help"])
    assert exit.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {path.name} ")


def test_only_the_command_line_imports_the_benchmarks() -> None:
    package = ROOT / "t2t_fast"
    importing = {
        path.relative_to(package).parts[0]
        for path in package.rglob("*.py")
        if re.search(r"^\s*(from|import)\s.*\bbench\b", path.read_text(), re.MULTILINE)
    }
    assert importing == {"bench", "cli"}


def test_without_the_optional_packages(tmp_path: Path) -> None:
    """As on a machine with a GPU and without a network: all that gpu_report.py runs is imported, one is run."""
    arguments = [
        "--device",
        "cpu",
        "--img-size",
        "64",
        "--batch-size",
        "2",
        "--repeats",
        "2",
        "--models",
        "t2t_vit_7",
        "--variants",
        "auto",
        "--synthetic",
        "--output",
    ]
    code = f"""
import sys
sys.modules |= dict.fromkeys(("rich", "matplotlib", "sklearn", "webdataset"))
from t2t_fast.bench import compare, gpu_report, kernels, memory, report, resources, scaling, throughput, tune
sys.exit(throughput.main({[*arguments, str(tmp_path / "run.json")]!r}))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert any(line.split()[:2] == ["t2t_vit_7", "auto"] for line in run.stdout.splitlines()), run.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_without_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results go to the working directory; what works on the project's files says so."""
    env = {"torch": "2.15.0+cpu", "triton": None}
    date = datetime(2026, 1, 2)
    assert common.result_path(None, "cpu", env, date).parent == ROOT / "benchmarks" / "results" / "local"
    monkeypatch.setattr(common, "_ROOT", tmp_path / "site-packages")
    monkeypatch.chdir(tmp_path)
    assert common.result_path(None, "cpu", env, date) == tmp_path / "cpu_torch2.15.0_20260102-000000.json"
    with pytest.raises(UsageError, match="this needs a checkout of the project"):
        common.checkout()
