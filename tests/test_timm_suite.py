"""timm's own tests of models, from its source distribution, with this package's models in them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import timm
from small_models import FAMILIES
from timm_suite_plugin import SUBSTITUTIONS

ROOT = Path(__file__).resolve().parents[1]
FILES = ("test_models.py", "test_model_input.py")


@pytest.fixture(scope="module")
def timm_tests(pytestconfig: pytest.Config) -> Path:
    """The ``tests`` folder of the installed timm's source distribution, downloaded once."""
    folder = Path(pytestconfig.cache.mkdir(f"timm-{timm.__version__}"))
    if not (folder / "tests").is_dir():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            _download(Path(temporary))
            tests = Path(temporary) / f"timm-{timm.__version__}" / "tests"
            if not tests.is_dir():
                pytest.skip(f"the source distribution of timm {timm.__version__} has no tests")
            tests.rename(folder / "tests")
    if not all((folder / "tests" / name).exists() for name in FILES):
        pytest.skip(f"timm {timm.__version__} does not have all of {', '.join(FILES)}")
    return folder / "tests"


def _download(folder: Path) -> None:
    name = f"timm=={timm.__version__}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "timm", name, "-d", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip(f"downloading the source distribution of {name} took too long")
    if done.returncode != 0:
        pytest.skip(f"the source distribution of {name} cannot be downloaded: {done.stderr.strip()[-200:]}")
    (archive,) = folder.glob("timm-*.tar.gz")
    with tarfile.open(archive) as opened:
        members = [member for member in opened.getmembers() if "/tests/" in member.name]
        opened.extractall(folder, members, filter="data")


def run_timm_tests(tests: Path, folder: Path, names: Sequence[str], files: Sequence[str], *options: str) -> int:
    """Run timm's ``files`` with ``names`` in place of its models; all tests must pass. Returns how many did."""
    for name in files:
        text = (tests / name).read_text()
        for old, new in SUBSTITUTIONS.items():
            text = text.replace(old, new.format(name=names[0]))
        (folder / name).write_text(text)
    shutil.copy(tests / "conftest.py", folder)
    (folder / "pytest.ini").write_text("[pytest]\n")
    code = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}; import pytest; sys.exit(pytest.main())"
    plugin = ["-p", "timm_suite_plugin", "--t2t-names", ",".join(names)]
    command = [
        sys.executable,
        "-c",
        code,
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        *plugin,
        *options,
        str(folder),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert "skipped" not in done.stdout
    return int(passed[1])


@pytest.mark.slow
def test_both_files_with_one_model(timm_tests: Path, tmp_path: Path) -> None:
    assert run_timm_tests(timm_tests, tmp_path, ["t2t_vit_7"], FILES) >= 28


@pytest.mark.slow
def test_one_model_of_each_family(timm_tests: Path, tmp_path: Path) -> None:
    """Without the tests of pruning, which run every model once per block or so: those are for the model above."""
    names = [name for name in FAMILIES.values() if name != "t2t_vit_7"]
    assert run_timm_tests(timm_tests, tmp_path, names, FILES[:1], "-k", "not prune") >= 8 * len(names)
