"""benchmarks/tune.py: candidates that crash, hang or do not fit are out, and nothing else is."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from t2t_fast.bench import tune
from t2t_fast.kernels import configs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="--tiny needs the interpreter")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Every candidate is right, and none is faster."""
    monkeypatch.setattr(tune, "apart", lambda function, *arguments, **options: None)
    monkeypatch.setattr(tune, "time_candidate", lambda *arguments: [1.0])
    return tune


def rows_of(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    path = folder / "tuning.json"
    assert tune.main(["--tiny", "--output", str(path), *arguments]) == 0
    return json.loads(path.read_text())["rows"]


def test_a_process_that_crashes_or_hangs_is_a_reason() -> None:
    assert tune.apart(max, 3, 4) == 4
    assert tune.apart(int, "x").startswith("ValueError: invalid literal")
    assert tune.apart(os._exit, 3) == "the process died, exit code 3"
    assert tune.apart(os.abort) == "the process died, exit code -6"
    started = time.monotonic()
    assert tune.apart(time.sleep, 60, seconds=0.5) == "no answer within 0.5 s"
    assert time.monotonic() - started < 20


@pytest.mark.slow
def test_tiny(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checked in processes, timed here; a wrong configuration does not pass."""
    (row,) = rows_of(tmp_path)
    assert row["status"] == "ok"
    assert row["tried"] == 2
    assert row["failed"] == {}
    assert all(candidate["seconds"] for candidate in row["candidates"])
    assert "ADD_LAYER_NORM, tf32: 2 tried, 0 failed, best " in capsys.readouterr().out
    config = tune.neighbours(_shipped())[0]
    broken = dataclasses.replace(config, blocks={"BLOCK_TOKENS": 3})  # no power of two
    assert "arange" in tune.apart(tune.check, "ADD_LAYER_NORM", broken, "tf32", "cpu", 1)


def _shipped() -> Any:
    return configs.pick(configs.ADD_LAYER_NORM, torch.device("cpu"), torch.float32)


def test_a_candidate_that_cannot_be_timed_is_out(
    quick: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def second_does_not_fit(*arguments: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory left")
        return [1.0]

    monkeypatch.setattr(quick, "time_candidate", second_does_not_fit)
    (row,) = rows_of(tmp_path)
    assert list(row["failed"].values()) == ["OutOfMemoryError: no memory left"]
    assert (row["status"], row["best"]) == ("ok", 1.0)
    assert [candidate["seconds"] for candidate in row["candidates"]] == [[1.0], None]


def test_the_shipped_configuration_cannot_be_timed(
    quick: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After an error that leaves this process without its device, the others are timed in processes of their own."""
    alive = [True]

    def sticky(*arguments: Any) -> list[float]:
        assert alive[0]
        alive[0] = False
        raise RuntimeError("an illegal memory access")

    def apart(function: Any, *arguments: Any) -> Any:
        return None if function is quick.check else [2.0]

    monkeypatch.setattr(quick, "time_candidate", sticky)
    monkeypatch.setattr(quick, "_usable", lambda device_name: alive[0])
    monkeypatch.setattr(quick, "apart", apart)
    (row,) = rows_of(tmp_path)
    assert row["status"] == "shipped configuration: RuntimeError: an illegal memory access"
    assert row["best"] is None
    assert row["candidates"][1]["seconds"] == [2.0]
    assert "1 failed, shipped configuration: RuntimeError" in capsys.readouterr().out


@pytest.mark.parametrize(("again", "wins"), [(0.5, True), (1.1, False)])
def test_the_fastest_must_win_twice(
    quick: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: float, wins: bool
) -> None:
    """The candidate beside the shipped one has another BLOCK_TOKENS, and is faster the first time."""
    shipped, seen = _shipped().blocks["BLOCK_TOKENS"], list[int]()

    def timed(table: str, config: Any, *rest: Any) -> list[float]:
        seen.append(config.blocks["BLOCK_TOKENS"])
        return [1.0 if seen[-1] == shipped else 0.5 if len(seen) == 2 else again]

    monkeypatch.setattr(quick, "time_candidate", timed)
    (row,) = rows_of(tmp_path)
    candidate = seen[1]
    assert candidate != shipped
    assert seen == [shipped, candidate, shipped, candidate, candidate, shipped, shipped, candidate]
    assert (row["best"], row["best_index"]) == ((again, 1) if wins else (1.0, 0))
    (line,) = json.loads((tmp_path / "tuning.json").read_text())["snippets"]
    assert f"tokens={candidate if wins else shipped}, " in line
    assert 'tuned="the interpreter"' in line


@pytest.mark.parametrize("fails", ["candidate", "shipped"])
def test_what_fails_when_timed_again_is_out(
    quick: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    shipped, seen = _shipped().blocks["BLOCK_TOKENS"], list[int]()

    def timed(table: str, config: Any, *rest: Any) -> list[float]:
        seen.append(config.blocks["BLOCK_TOKENS"])
        if len(seen) > 2 and (seen[-1] == shipped) == (fails == "shipped"):
            raise RuntimeError("a launch that failed")
        return [1.0 if seen[-1] == shipped else 0.5]

    monkeypatch.setattr(quick, "time_candidate", timed)
    (row,) = rows_of(tmp_path)
    snippets = json.loads((tmp_path / "tuning.json").read_text())["snippets"]
    assert list(row["failed"].values()) == ["RuntimeError: a launch that failed"]
    if fails == "shipped":
        assert (row["best"], snippets) == (None, [])
        assert row["status"] == "shipped configuration: RuntimeError: a launch that failed"
    else:
        assert (row["best"], row["status"]) == (1.0, "ok")
        assert f"tokens={shipped}, " in snippets[0]


def test_what_was_tuned_on_this_chip_is_left_out(
    quick: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for chip, found in (("another chip", 1), ("the interpreter", 0)):
        config = dataclasses.replace(_shipped(), tuned=chip)
        table = configs.Table({0: {"float32": config, "tf32": config}})
        monkeypatch.setattr(configs, "ADD_LAYER_NORM", table)
        assert len(rows_of(tmp_path)) == found
    assert "ADD_LAYER_NORM, tf32: tuned on this chip already" in capsys.readouterr().out
    assert len(rows_of(tmp_path, "--again")) == 1
