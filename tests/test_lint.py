"""mypy sees the kernels' launchers: a wrong call of one is found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLANTED = """
from torch import Tensor

from t2t_fast.kernels import soft_split, token_performer
from t2t_fast.kernels.windows import View, Window


def call(image: Tensor, view: View, window: Window) -> None:
    soft_split.forward_launch(image, image, view, window)
    soft_split.forward_launch("image", image, view, window)
    soft_split.forward_launch(image, image, view)
    token_performer.num_dropped("0.1")
    soft_split.backwards_launch(image, image, view, window)
"""


def test_wrong_calls_of_launchers_are_found(tmp_path: Path) -> None:
    tree = ROOT / "build" / "types" / "t2t_fast"  # as `make lint` lays it out
    if not tree.exists():
        tree.mkdir(parents=True)
        for entry in (*(ROOT / "t2t_fast").iterdir(), ROOT / "kernels"):
            os.symlink(entry, tree / entry.name)
    (tmp_path / "planted.py").write_text(PLANTED)
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(tmp_path / "planted.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line.partition(": error: ") for line in done.stdout.splitlines() if "planted.py" in line]
    found = {int(place.rpartition(":")[2]): message for place, _, message in lines}
    assert sorted(found) == [10, 11, 12, 13], done.stdout + done.stderr
    assert 'Argument 1 to "forward_launch" has incompatible type "str"' in found[10]
    assert "Missing positional argument" in found[11]
    assert 'Argument 1 to "num_dropped" has incompatible type "str"' in found[12]
    assert "has no attribute" in found[13]
