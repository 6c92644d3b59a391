"""benchmarks/tokens_to_token.py in a tiny configuration."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "tokens_to_token.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)


def test_table_and_result_file(tmp_path: Path) -> None:
    """An output without a suffix is a folder."""
    folder = tmp_path / "results"
    done = run("--models", "t2t_vit_7", "--batch-size", "1", "--blocks", "1", "--output", str(folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("t2t_vit_7") == 3
    (written,) = folder.iterdir()
    assert written.suffix == ".json"
    result = json.loads(written.read_text())
    assert [row["part"] for row in result["rows"]] == ["module forward", "module training step", "model forward"]
    for row in result["rows"]:
        assert row["passed"]
        assert len(row["times"]["auto"]) == len(row["times"]["reference"]) == 5
        assert row["ratio"] == row["median_s"]["reference"] / row["median_s"]["auto"]


def test_an_unknown_model_is_named_in_one_line() -> None:
    done = run("--models", "t2t_vit_99")
    assert done.returncode == 2
    assert "'t2t_vit_99' is unknown; accepted: t2t_vit_7, t2t_vit_10" in done.stderr
    assert "Traceback" not in done.stderr
