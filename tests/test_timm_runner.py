"""``python -m t2t_fast.timm SCRIPT``, and timm's own switch for modules of models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from t2t_fast.timm import main

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import sys
import helper  # a module beside the script
import timm

if __name__ == "__main__":
    model = timm.create_model(sys.argv[1], img_size=32, num_classes=5, depth=1)
    print(timm.__name__, timm.__version__.count(".") >= 2, helper.WORD, type(model).__name__, sys.argv[2:])
    sys.exit(int(sys.argv[3]))
"""


def test_a_script_sees_our_models(tmp_path: Path) -> None:
    script = tmp_path / "scripts" / "show.py"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    (script.parent / "helper.py").write_text("WORD = 'beside'\n")
    command = [sys.executable, "-m", "t2t_fast.timm", str(script), "t2t_vit_7", "--flag", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert done.stdout.strip() == "timm True beside T2TViT ['--flag', '3']"


@pytest.mark.parametrize("words", [("nowhere.py",), (".",), ()])
def test_without_a_script_there_is_one_line(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert not out
    (line,) = err.splitlines()
    assert "usage: python -m t2t_fast.timm SCRIPT" in line
    assert not words or repr(words[0]) in line


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert capsys.readouterr() == ("usage: python -m t2t_fast.timm SCRIPT [ARGUMENT ...]\n", "")
