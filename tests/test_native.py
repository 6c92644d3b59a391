"""Loading of the extension: every reason for doing without it is told, and none stops the package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from t2t_fast import BackendUnavailable, ops
from t2t_fast.ops.common import extension

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
ROOT = Path(__file__).resolve().parents[1]


def folder_with(path: Path, *, binary: bytes | None = b"no library", report: object = None, **changes: object) -> Path:
    """A folder as the package's, with a file in place of the extension and a report of its build."""
    good = {"built": True, "torch": torch.__version__, "cpu_capability": "DEFAULT"}
    if binary is not None:
        (path / f"_C{SUFFIX}").write_bytes(binary)
    (path / f"_C{SUFFIX}").with_suffix(".json").write_text(json.dumps(good | changes if report is None else report))
    return path


def test_the_extension_of_this_installation_is_loaded() -> None:
    assert extension.why_not_loaded is None, extension.why_not_loaded
    state = extension.describe()
    assert state["built"] and state["loaded"]
    assert state["torch"] == torch.__version__.partition("+")[0]
    assert all(hasattr(torch.ops.t2t_fast, op) for op in ("se_gate", "se_gate_backward", "se_mlp", "se_mlp_backward"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"built": False, "reason": "the C++ build failed: x.cpp:1: error"},
            "not built: the C++ build failed: x.cpp:1",
        ),
        ({"torch": "2.0.1+cpu"}, f"built for torch 2.0.1+cpu, and this is {torch.__version__[:4]}"),
        ({"cpu_capability": "AVX1024"}, "built for AVX1024 instructions, and this CPU is used with"),
        ({"binary": None}, f"not built: there is no _C{SUFFIX}"),
        ({"report": [1]}, "is missing or damaged"),
    ],
)
def test_what_is_not_opened(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    module, reason = extension.load(folder_with(tmp_path, **changes))
    assert module is None
    assert words in str(reason)
    assert "pip install --no-build-isolation" in str(reason)


def test_an_extension_of_another_python_is_named(tmp_path: Path) -> None:
    folder_with(tmp_path, binary=None)
    (tmp_path / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    assert re.search(r"_C\.cpython-39-x86_64-linux-gnu\.so, .*another Python", str(extension.load(tmp_path)[1]))


def test_a_missing_symbol_keeps_its_own_words(tmp_path: Path) -> None:
    source = tmp_path / "broken.c"
    source.write_text("extern int a_symbol_nobody_has(void); int (*PyInit__C)(void) = a_symbol_nobody_has;")
    package = tmp_path / "package"
    package.mkdir()
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", package / f"_C{SUFFIX}"], check=True)
    (package / "__init__.py").touch()
    folder_with(package, binary=None)
    sys.path.insert(0, str(tmp_path))
    try:
        module, reason = extension.load(package, "package._C")
    finally:
        sys.path.remove(str(tmp_path))
    assert module is None
    assert "could not be loaded: ImportError" in str(reason)
    assert "a_symbol_nobody_has" in str(reason)


def test_without_the_extension_auto_goes_on_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "module", None)
    monkeypatch.setattr(extension, "why_not_loaded", "the extension is not built: nobody cared")
    x, w = torch.randn(2, 5, 8), torch.randn(3, 8)
    with pytest.raises(BackendUnavailable, match=r"native.*not built: nobody cared"):
        ops.se_gate(x, w, w.T, backend="native")
    torch.testing.assert_close(ops.se_gate(x, w, w.T), ops.se_gate(x, w, w.T, backend="reference"))


def test_a_lesser_cpu_setting_keeps_it_closed() -> None:
    if extension.describe()["cpu_capability"] == "DEFAULT":
        pytest.skip("built for any CPU")
    code = "from t2t_fast.ops.common import extension; print(extension.why_not_loaded)"
    environment = {"ATEN_CPU_CAPABILITY": "default", "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert "instructions, and this CPU is used with" in done.stdout, done.stderr
