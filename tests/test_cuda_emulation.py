"""The CUDA sources without a GPU: nvcc's verdict on them, and their kernels run on the CPU under the sanitizers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "tests" / "cuda_emulation"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
INCLUDES = [f"-I{path}" for path in include_paths()]
NVCC = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
ARCHITECTURES = ("80", "86", "89", "90", "100")

needs_gcc = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ and its sanitizers")


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([str(part) for part in command], env=env, capture_output=True, text=True, timeout=900)


def compile_object(source: Path, folder: Path) -> Path:
    """One source of the extension, or of the emulation, as C++ under the sanitizers."""
    macros = ["-DT2T_FAST_EMULATION", "-DT2T_FAST_LIBRARY=t2t_fast_emulated"]
    flags = ["-x", "c++", "-std=c++20", "-O1", "-g1", "-fPIC", "-w", f"-I{HERE}", *SANITIZERS, *macros, *INCLUDES]
    target = folder / f"{source.parent.name}-{source.name}.o"  # families have files of one name
    done = run("g++", *flags, "-c", source, "-o", target)
    assert done.returncode == 0, done.stderr[-4000:]
    return target


def link(objects: list[Path], library: Path) -> Path:
    torch_libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    done = run("g++", "-shared", *SANITIZERS, *objects, "-o", library, *torch_libraries)
    assert done.returncode == 0, done.stderr[-4000:]
    return library


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """All of the extension but its Python module, with tensors of the CPU sent to the CUDA passes."""
    left_out = {"build_info.cpp", "passes_for.cpp"}
    sources = [path for path in sorted((ROOT / "csrc").rglob("*.c[pu]*")) if path.name not in left_out]
    folder = tmp_path_factory.mktemp("emulation")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda source: compile_object(source, folder), [*sources, HERE / "passes_for.cpp"]))


def check(library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the comparison in a process that has AddressSanitizer from its start."""
    preload = [run("g++", f"-print-file-name={name}").stdout.strip() for name in ("libasan.so", "libstdc++.so")]
    environment = {"LD_PRELOAD": ":".join(preload), "ASAN_OPTIONS": "detect_leaks=0"}
    return run(sys.executable, HERE / "check.py", library, *arguments, **environment)


@needs_gcc
@pytest.mark.slow
def test_kernels_agree_with_the_cpu_and_the_reference(objects: list[Path], tmp_path: Path) -> None:
    done = check(link(objects, tmp_path / "emulated.so"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.endswith("all agree\n")


PLANTS = {
    "a barrier missing between a warp's sums and the block's": (
        "  __syncthreads();\n  const int64_t first",
        "  const int64_t first",
        "AssertionError",
    ),
    "a barrier missing between the gate's two matmuls": (
        "  __syncthreads();\n  const A of_image = scale == nullptr ? A(1) : scale[image];\n  for",
        "  const A of_image = scale == nullptr ? A(1) : scale[image];\n  for",
        "AssertionError",
    ),
    "one token too many": (
        "if (at < tile.extent.tokens) load",
        "if (at <= tile.extent.tokens) load",
        "AddressSanitizer",
    ),
    "one channel too many": (
        "left < Width ? int(left)",
        "left < Width ? int(left) + 1",
        "AddressSanitizer|AssertionError",
    ),
    "too little shared memory": ("size_t(kWarps * across", "size_t((kWarps - 1) * across", "AddressSanitizer"),
}


@needs_gcc
@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTS)
def test_planted_mistakes_are_caught(name: str, objects: list[Path], tmp_path: Path) -> None:
    before, after, verdict = PLANTS[name]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    kernels = tmp_path / "csrc" / "se" / "passes_cuda.cu"
    text = kernels.read_text()
    assert text.count(before) == 1, "the source has changed: plant the mistake elsewhere"
    kernels.write_text(text.replace(before, after))
    planted = [path for path in objects if not path.name.endswith("passes_cuda.cu.o")]
    done = check(link([*planted, compile_object(kernels, tmp_path)], tmp_path / "planted.so"), "quick")
    assert done.returncode != 0
    assert re.search(verdict, done.stderr), done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_nvcc_compiles_for_every_architecture_without_spills(tmp_path: Path) -> None:
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", *targets, *INCLUDES]
    kernels = ROOT / "csrc" / "se" / "passes_cuda.cu"
    done = run(str(NVCC), "--threads=2", *flags, "-c", kernels, "-o", tmp_path / "kernels.o")
    assert done.returncode == 0, done.stderr[-4000:]
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    compiled = re.findall(r"Compiling entry function '\w+?([a-z_]+_kernel)\w*' for 'sm_(\d+)'", done.stderr)
    names = set(re.findall(r"([a-z_]+_kernel)\(", kernels.read_text()))
    assert {(name, arch) for name in names for arch in ARCHITECTURES} == {(n.lstrip("_"), a) for n, a in compiled}
    assert len(frames) == len(compiled)
    assert set(frames) == {("0", "0", "0")}
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", done.stderr)]
    assert max(registers) <= 128  # two blocks of 256 threads and more per multiprocessor
