"""t2t_fast.bench as a package: its scripts and commands, its place among the others, and what it does without."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

import t2t_fast
from t2t_fast.bench import common
from t2t_fast.bench.tables import KINDS
from t2t_fast.cli import macs, main
from t2t_fast.usage import UsageError

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


def test_macs_of_the_paper_as_a_result_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """benchmarks/report.py makes a table of it."""
    names = ("vit_small_patch16_224_of_the_paper", "t2t_vit_7")
    assert main(["macs", *names, "--output", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("macs-224px_torch")
    assert str(path) in err and all(name in out for name in names)
    result = json.loads(path.read_text())
    assert result["benchmark"] == "macs"
    assert result["command"] == f"python -m t2t_fast macs {' '.join(names)}"
    of_ours = sum(p.numel() for p in t2t_fast.create_model("t2t_vit_7").parameters())
    assert [row["params"] for row in result["rows"]] == [48754408, of_ours]
    assert "| t2t_vit_7 | 4.3 | 4.3 | 1.15 | 1.1 | +4.3% (rounds to it) |" in KINDS["macs"](result)
    assert set(names) < {*macs._resolve_names(["zoo", "paper"])}


def test_bench_is_the_throughput_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    """Options are its own, and so are the answers."""
    assert main(["bench", "--models", "t2t_vit_77", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("t2t-fast bench: error: --models: 't2t_vit_77' is unknown")
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", "--batch-size", "0"])
    assert exit_info.value.code == 2
    assert "--batch-size: got '0'" in capsys.readouterr().err
