"""benchmarks/se_mlp.py in a tiny configuration."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "se_mlp.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)


def test_table_and_result_file(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    done = run("--shapes", "2,5,16,8", "--dtypes", "float32", "--blocks", "1", "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2x5x16x8") == 4
    result = json.loads(output.read_text())
    assert [(row["part"], row["allocator"]) for row in result["rows"]] == [
        ("forward", "fresh"),
        ("forward", "grown"),
        ("training step", "fresh"),
        ("training step", "grown"),
    ]
    for row in result["rows"]:
        assert row["passed"]
        assert row["to_aten"] == row["median_s"]["aten"] / row["median_s"]["native"]
        assert ("products" in row["times"]) == (row["part"] == "forward")


def test_a_wrong_shape_is_named_in_one_line() -> None:
    done = run("--shapes", "2,5,16")
    assert done.returncode == 2
    assert "got '2,5,16'; accepted: images,tokens,channels,hidden" in done.stderr
    assert "Traceback" not in done.stderr
