"""The environment that result files and bug reports tell of."""

from __future__ import annotations

from pathlib import Path

import pytest

from t2t_fast import env


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("model name\t: AMD EPYC\ncpu family\t: 25\nmodel\t\t: 17\n\nmodel\t: 99\n", "AMD EPYC, family 25 model 17"),
        ("model name\t: AMD EPYC 9654\ncpu family\t: 25\nmodel\t\t: 17\n", "AMD EPYC 9654"),
        ("model name\t: Mystery\n", "Mystery"),
    ],
)
def test_a_cpu_without_a_number_is_told_by_its_family(told: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kinds of "AMD EPYC" may differ by a factor of two: their results must not be taken for one another's."""
    monkeypatch.setattr(Path, "read_text", lambda self: told)
    assert env._cpu_model() == name
