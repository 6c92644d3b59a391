"""benchmarks/memory.py: exact figures, the N x N matrix that must not exist, and answers to bad arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from t2t_fast.bench import memory


def test_allocations_are_added_up() -> None:
    def function() -> torch.Tensor:
        kept = torch.ones(1000)
        torch.ones(5000)  # gone at once
        return kept

    phase, result = memory.record(function, "cpu")
    assert phase.largest == 20000
    assert phase.peak == 24000
    assert phase.end == result.numel() * 4


def test_token_transformer_never_makes_the_matrix_of_its_scores(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    arguments = ["--models", "t2t_vit_t_14", "--img-size", "112", "--batch-size", "2", "--device", "cpu"]
    assert memory.main([*arguments, "--output", str(path)]) == 0
    rows = {row["variant"]: row for row in json.loads(path.read_text())["rows"]}
    scores = 2 * (28 * 28) ** 2 * 4
    assert rows["reference"]["largest_inference"] >= scores  # the measurement sees it where it is
    assert rows["reference"]["largest_training"] >= scores
    for variant in ("auto", "checkpointing"):
        assert rows[variant]["largest_inference"] < scores / 2
        assert rows[variant]["largest_training"] < scores / 2
    assert rows["auto"]["backward"] < rows["reference"]["backward"]
    assert rows["checkpointing"]["kept"] < rows["auto"]["kept"] / 3
    assert all(row["status"] == "ok" for row in rows.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "t2t_vit_77"], "--models: 't2t_vit_77' is unknown"),
        (["--models", "resnet50"], "--models: 'resnet50' is none of this package's"),
        (["--img-size", "4"], "--img-size: got 4, which t2t_vit_14 does not take"),
        (["--batch-size", "0"], "--batch-size: got '0'; accepted: a whole number of at least 1"),
        (["--variants", "frozen"], "--variants: invalid choice: 'frozen'"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        memory.main([*arguments, "--device", "cpu", "--output", str(tmp_path)])
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []
