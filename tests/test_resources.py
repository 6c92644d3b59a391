"""The kernels compiled ahead of time: the table in the repository belongs to them, and nothing spills."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import triton

from t2t_fast.bench import resources

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "resources.py"
TABLE = json.loads((ROOT / "benchmarks" / "resources.json").read_text())


# KiB that a block gets at most; at 80, what 8.6 gives, but for TF32's backward, which 8.6 does not take.
SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, SCRIPT, *arguments], env=environment, capture_output=True, text=True)


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["kernel"], row["use"], row["arch"], row["kind"]


def test_the_table_is_complete_and_clean() -> None:
    rows = TABLE["rows"]
    assert {row["arch"] for row in rows} == {80, 89, 90, 100, 120}
    assert {row["kind"] for row in rows} == {"float16", "bfloat16", "tf32", "float32"}
    assert len({key(row) for row in rows}) == len(rows)
    counts = Counter((row["arch"], row["kind"]) for row in rows)
    for (arch, kind), count in counts.items():
        # What is not built there: see None in kernels/configs.py.
        inference, training = kind != "float32", kind != "float32" and arch != 120 and (arch, kind) != (89, "tf32")
        assert count == 28 + 5 * inference + 2 * training, (arch, kind)
    for row in rows:
        assert row["spilled_bytes"] == 0, key(row)
        assert row["registers"] <= 255
        assert row["shared_bytes"] <= SHARED[row["arch"]] * 1024, key(row)
        assert bool(row["tensor_cores"]) == (row["multiplies"] and row["kind"] != "float32"), key(row)
        if row["arch"] == 90 and row["tensor_cores"] and row["kernel"].startswith("soft_split_linear"):
            assert row["tensor_cores"] == ["wgmma.mma_async"]  # the Performer's tiles are too small for it


def test_the_table_belongs_to_the_kernels() -> None:
    assert TABLE["kernels"] == resources.source_digest(), "the kernels have changed: run python benchmarks/resources.py"


@pytest.mark.slow
def test_compiling_again_gives_the_table() -> None:
    rows = {}
    for selection in (("--arch", "90", "--kind", "bfloat16"), ("--arch", "80", "--kind", "tf32")):
        done = run(*selection, "--dry-run", "--json")
        assert done.returncode == 0, done.stderr  # a spill, or a matmul without tensor cores
        rows |= {key(row): row for row in json.loads(done.stdout)}
    kept = {key(row): row for row in TABLE["rows"] if key(row) in rows}
    assert rows.keys() == kept.keys()
    if TABLE["triton"] == triton.__version__:
        assert rows == kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "90"], "no whole table: .*--dry-run"),
        (["--dry-run"], "TRITON_INTERPRET is set.*unset it"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as exit:
        resources.main(arguments)
    assert exit.value.code == 2
    assert re.match(f"resources.py: error: .*{message}", capsys.readouterr().err)
