"""Every way to install the package gives the same package, and importing it costs next to nothing."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("t2t_fast", "kernels", "csrc", "benchmarks", "tests")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE")

RUN_A_MODEL = """
import json, t2t_fast, t2t_fast.kernels, timm, torch
model = timm.create_model("t2t_vit_7", img_size=64, num_classes=5).eval()
assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
print(json.dumps([t2t_fast.__file__, t2t_fast.kernels.__file__]))
"""

# Compilers are other programs: g++, nvcc and ptxas, and the C compiler of Triton's launchers.
IMPORT = """
import json, sys, time, timm, torch
modules, processes = set(sys.modules), []
def note(event, args):
    if event in {"subprocess.Popen", "os.posix_spawn", "os.exec", "os.system"}:
        processes.append(str(args[0]))
sys.addaudithook(note)
start = time.perf_counter()
import t2t_fast
seconds = time.perf_counter() - start
print(json.dumps({
    "seconds": seconds,
    "modules": sorted(set(sys.modules) - modules),
    "processes": processes,
    "cuda": torch.cuda.is_initialized(),
}))
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed, in an environment that points at no other installation.

    The extension has tests of its own, so it is not built unless ``T2T_FAST_NO_EXT`` says so.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "T2T_FAST_"))}
    env |= {"T2T_FAST_NO_EXT": "1", **environment}
    result = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, f"{command} failed:\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project to build from: builds write into the tree."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "_C.*.json"))
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    return copy


def make_venv(folder: Path) -> Path:
    """An environment with the dependencies of the running one, but not its t2t_fast.

    A path added by a .pth file has its own .pth files ignored: the finder of an editable t2t_fast stays out.
    """
    path = folder / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", path, cwd=folder)
    dependencies = [entry for entry in sys.path if entry.endswith("-packages")]
    (site_packages(path) / "dependencies.pth").write_text("\n".join(dependencies))
    return path


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    return make_venv(tmp_path)


@pytest.fixture(scope="module")
def archives(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist and the wheel built from it."""
    dist = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, cwd=source)
    return {"sdist": next(dist.glob("*.tar.gz")), "wheel": next(dist.glob("*.whl"))}


@pytest.fixture(scope="module")
def installed(
    source: Path, archives: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Environments with the package installed from "directory", "wheel" or "sdist", each made once."""

    @functools.cache
    def make(kind: str) -> Path:
        venv = make_venv(tmp_path_factory.mktemp(kind))
        install(venv, {"directory": source, **archives}[kind])
        return venv

    return make


def site_packages(venv: Path) -> Path:
    return next(venv.glob("lib/python*/site-packages"))


def install(venv: Path, *what: str | Path, **environment: str) -> None:
    # --ignore-installed: the t2t_fast of the running environment does not count
    pip = (sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "install")
    run(*pip, "--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed", *what, cwd=venv, **environment)


def imported_from(venv: Path, cwd: Path) -> list[Path]:
    """Run a model and return the folders of `t2t_fast` and `t2t_fast.kernels`."""
    output = run(venv / "bin" / "python", "-c", RUN_A_MODEL, cwd=cwd)
    return [Path(file).parent for file in json.loads(output.splitlines()[-1])]


@pytest.mark.slow
def test_editable_install(source: Path, venv: Path, tmp_path: Path) -> None:
    install(venv, "--editable", source)
    assert imported_from(venv, cwd=tmp_path) == [source / "t2t_fast", source / "kernels"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["directory", "wheel", "sdist"])
def test_regular_install(kind: str, installed: Callable[[str], Path], tmp_path: Path) -> None:
    venv = installed(kind)
    package = site_packages(venv) / "t2t_fast"
    assert imported_from(venv, cwd=tmp_path) == [package, package / "kernels"]


@pytest.mark.slow
def test_regular_install_in_the_repository_root(installed: Callable[[str], Path], source: Path) -> None:
    assert imported_from(installed("wheel"), cwd=source) == [source / "t2t_fast", source / "kernels"]


@pytest.mark.slow
def test_uninstalled_in_the_repository_root(source: Path, venv: Path) -> None:
    assert imported_from(venv, cwd=source) == [source / "t2t_fast", source / "kernels"]
    result = next((source / "benchmarks" / "results").glob("cpu-*.json"))
    output = run(venv / "bin" / "python", "benchmarks/compare.py", result, result, cwd=source)
    assert "t2t_vit_14" in output


USE_THE_EXTENSION = """
import json, torch, t2t_fast
from t2t_fast.env import collect_env
x, r = torch.randn(2, 5, 8).bfloat16(), torch.randn(3, 8).bfloat16()
torch.set_num_threads(2)
explanation = t2t_fast.explain(lambda: t2t_fast.ops.se_gate(x, r, r.T))
print(json.dumps({"extension": collect_env()["extension"], "explain": str(explanation)}))
"""


def extension_after_install(venv: Path, source: Path, cwd: Path, **environment: str) -> tuple[dict[str, Any], str]:
    """What `python -m t2t_fast env` and `explain` know of the extension that an installation has built."""
    install(venv, source, T2T_FAST_NO_EXT="0", **environment)
    output = run(venv / "bin" / "python", "-c", USE_THE_EXTENSION, cwd=cwd)
    found = json.loads(output.splitlines()[-1])
    return found["extension"], found["explain"]


@pytest.mark.slow
def test_extension_with_a_compiler_alone(source: Path, venv: Path, tmp_path: Path) -> None:
    state, explained = extension_after_install(venv, source, tmp_path, CUDA_HOME=str(tmp_path / "none"))
    assert state["built"] and state["loaded"] and state["architectures"] == ""
    assert "no CUDA toolkit" in state["no_cuda"]
    assert explained.startswith("se_gate x1: native")


@pytest.mark.slow
def test_installs_without_a_compiler(source: Path, venv: Path, tmp_path: Path) -> None:
    state, explained = extension_after_install(venv, source, tmp_path, CXX="no-such-compiler")
    assert not state["built"] and not state["loaded"]
    assert "no C++ compiler (no-such-compiler)" in state["reason"]
    assert re.search(r"native: .*not built: .*no C\+\+ compiler", explained)


@pytest.mark.slow
def test_installs_without_the_extension(installed: Callable[[str], Path], tmp_path: Path) -> None:
    output = run(installed("directory") / "bin" / "python", "-m", "t2t_fast", "env", cwd=tmp_path)
    assert re.search("not built: T2T_FAST_NO_EXT=1", output)


@pytest.mark.slow
def test_a_broken_build_is_reported_in_the_compilers_words(source: Path, venv: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(source, broken, ignore=shutil.ignore_patterns("build"))
    (broken / "csrc" / "broken.cpp").write_text("int broken = undeclared_name;\n")
    state, explained = extension_after_install(venv, broken, tmp_path, CUDA_HOME=str(tmp_path / "none"))
    assert not state["built"]
    for words in (state["reason"], explained):
        assert "the C++ build failed" in words
        assert "undeclared_name" in words


@pytest.mark.slow
def test_bench_of_an_installed_wheel(installed: Callable[[str], Path], tmp_path: Path) -> None:
    """Without a checkout the result lies in the working directory, and no commit is told."""
    tiny = ("--models", "t2t_vit_7", "--variants", "auto", "--img-size", "32", "--batch-size", "1", "--repeats", "1")
    options = (*tiny, "--synthetic", "--no-plot", "--device", "cpu")
    output = run(installed("wheel") / "bin" / "python", "-m", "t2t_fast", "bench", *options, cwd=tmp_path)
    (path,) = tmp_path.iterdir()
    assert f"results: {path}" in output
    result = json.loads(path.read_text())
    assert result["complete"] and result["environment"]["git"] is None


@pytest.mark.slow
def test_wheel_contents(archives: dict[str, Path]) -> None:
    names = zipfile.ZipFile(archives["wheel"]).namelist()
    assert {"t2t_fast/py.typed", "t2t_fast/kernels/__init__.py", "t2t_fast/bench/__init__.py"} <= set(names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"t2t_fast"}, "owns one top-level name"


@pytest.mark.slow
def test_sdist_contents(archives: dict[str, Path]) -> None:
    with tarfile.open(archives["sdist"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {*SOURCES, *FILES, "csrc/README.md", "tests/test_packaging.py"} <= names


def test_import_is_cheap() -> None:
    def imported() -> dict[str, Any]:
        return json.loads(run(sys.executable, "-c", IMPORT, cwd=ROOT).splitlines()[-1])

    report = imported()
    assert "t2t_fast" in report["modules"], "something else imported it"
    assert not {"torch.utils.cpp_extension", "torch._inductor.codecache"} & set(report["modules"])
    assert not any(name.startswith(("t2t_fast.bench", "t2t_fast.cli")) for name in report["modules"])
    assert report["processes"] == []
    assert not report["cuda"]
    # On a busy machine a first import may be slow by chance.
    assert report["seconds"] < 0.5 or min(imported()["seconds"] for _ in range(2)) < 0.5
