"""benchmarks/compare.py on made-up result files, whose differences are known."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from t2t_fast.bench import compare

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def make(path: Path, means: dict[str, float], spread: float = 0.02, **changes: Any) -> Path:
    """A result file with rows of 20 times around ``means``, by model."""
    generator = random.Random(path.name)
    rows = [
        {
            "model": model,
            "variant": "auto",
            "mode": "inference",
            "precision": "float32",
            "batch_size": 8,
            "img_size": 224,
            "seconds": [mean * (1 + spread * generator.uniform(-1, 1)) for _ in range(20)],
            "images_per_second": 8 / mean,
        }
        for model, mean in means.items()
    ]
    content = {"benchmark": "throughput", "device": "cpu", "hardware": "cpu X", "date": "today", "rows": rows}
    path.write_text(json.dumps(content | {"environment": {"torch": "2.15", "git": "abc"}} | changes))
    return path


def test_real_differences_and_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = make(tmp_path / "a.json", {"fast": 1.0, "slow": 1.0, "same": 1.0, "gone": 1.0})
    b = make(tmp_path / "b.json", {"fast": 0.8, "slow": 1.1, "same": 1.002, "new": 1.0})
    rows = {row["key"][0]: row for row in compare.compare(*(json.loads(p.read_text()) for p in (a, b)))}
    assert {name: compare.verdict(row) for name, row in rows.items()} == {
        "gone": "LOST: missing",
        "fast": "faster",
        "slow": "slower",
        "same": "same",
    }
    assert rows["fast"]["ratio"] == pytest.approx(1.25, rel=0.02)
    assert rows["fast"]["low"] < 1.25 < rows["fast"]["high"]
    assert rows["same"]["high"] - rows["same"]["low"] < 0.05
    assert compare.main([str(a), str(b)]) == 0
    assert compare.main([str(a), str(b), "--fail-below", "0.97"]) == 1
    told = capsys.readouterr().out
    assert "SLOWER: slow auto inference float32 8 224" in told
    assert "gone auto inference float32 8 224: LOST: missing" in told
    assert compare.main([str(a), str(a), "--fail-below", "0.99"]) == 0


def test_few_rounds_have_no_verdict(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a.json", {"m": 1.0}), make(tmp_path / "b.json", {"m": 2.0})
    short = json.loads(b.read_text())
    short["rows"][0]["seconds"] = short["rows"][0]["seconds"][:4]
    b.write_text(json.dumps(short))
    (row,) = compare.compare(json.loads(a.read_text()), short)
    assert compare.verdict(row) == "too few rounds"
    assert compare.main([str(a), str(b), "--fail-below", "0.99"]) == 0


@pytest.mark.parametrize(
    ("status", "code"),
    [("wrong", 1), ("out of memory", 1), ("failed: RuntimeError: x", 1), ("cannot run: y", 0), ("pending", 0)],
)
def test_rows_that_were_lost(status: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (make(tmp_path / name, {"m": 1.0, "n": 1.0}) for name in ("a.json", "b.json"))
    lost = json.loads(b.read_text())
    lost["rows"][1] |= {"status": status, "seconds": [], "images_per_second": None}
    b.write_text(json.dumps(lost))
    assert compare.main([str(a), str(b)]) == code
    assert f"n auto inference float32 8 224: LOST: {status}" in capsys.readouterr().out


def test_times_before_a_failure_do_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor does it matter that no row is left to compare."""
    a, b = (make(tmp_path / name, {"m": 1.0}) for name in ("a.json", "b.json"))
    failed = json.loads(b.read_text())
    failed["rows"][0]["status"] = "failed: RuntimeError: in the sixth round"
    b.write_text(json.dumps(failed))
    assert compare.main([str(a), str(b)]) == 1
    assert "LOST: failed: RuntimeError: in the sixth round" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{"images_per_second": None}, {"seconds": [0.0]}, {"seconds": ["1"]}])
def test_damaged_rows(changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (make(tmp_path / name, {"m": 1.0}) for name in ("a.json", "b.json"))
    damaged = json.loads(b.read_text())
    damaged["rows"][0] |= changes
    b.write_text(json.dumps(damaged))
    with pytest.raises(SystemExit) as exit:
        compare.main([str(a), str(b)])
    assert exit.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_noise_widens_the_interval() -> None:
    generator = random.Random(0)
    quiet, loud = ([1 + s * generator.uniform(-1, 1) for _ in range(30)] for s in (0.01, 0.3))
    width = [high - low for _, low, high in (compare.interval(t, t) for t in (quiet, loud))]
    assert width[1] > 5 * width[0]


def test_files_of_the_first_format() -> None:
    """Committed files have a backend in place of a variant."""
    results = sorted((BENCHMARKS / "results").glob("cpu-*101017.json"))
    old = json.loads(results[0].read_text())
    rows = compare.compare(old, old)
    assert ("t2t_vit_14", "auto", "inference", "float32", 16, 224) in [row["key"] for row in rows]
    assert all(row["ratio"] == 1 for row in rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hardware": "cpu Y"}, "the files are of different hardware: 'cpu X' and 'cpu Y'"),
        ({"benchmark": "memory"}, "the files are of different benchmark: 'throughput' and 'memory'"),
        ({"rows": []}, "the files have no timed row in common"),
        ({"rows": [1]}, "a row is none of throughput.py's"),
        ({"rows": [{"seconds": [1.0]}]}, "a row is none of throughput.py's"),
        ({"environment": [1]}, "a row is none of throughput.py's"),
        ({"with_loader": True}, "the files are of different with_loader: False and True"),
        ({"environment": {"cpu": {"torch_threads": 64}}}, "the files are of different threads: None and 64"),
    ],
)
def test_what_cannot_be_compared(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = make(tmp_path / "a.json", {"m": 1.0}), make(tmp_path / "b.json", {"m": 1.0}, **changes)
    with pytest.raises(SystemExit) as exit:
        compare.main([str(a), str(b)])
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(SystemExit):
        compare.main([str(a), str(tmp_path / "c.json")])
    assert "holds no rows" in capsys.readouterr().err
