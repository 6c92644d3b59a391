"""What pyproject.toml cannot say: where `t2t_fast.kernels` lives, and how the optional C++/CUDA extension is built.

The extension is built for the torch of the environment, with CUDA where there are nvcc and a torch built for CUDA;
whether there is a GPU is never asked. Where it cannot be built, the installation succeeds without it, and a file
beside where it would lie (``t2t_fast/_C.<platform>.json``) keeps the reason for `python -m t2t_fast env`.
From the environment:

``T2T_FAST_NO_EXT=1``           skips it.
``T2T_FAST_CPU_CAPABILITY``     DEFAULT, AVX2 or AVX512: the instructions it may use; those of this machine unless set.
``TORCH_CUDA_ARCH_LIST``        the GPUs to compile for; 8.0 to 10.0, and PTX for later ones, unless set.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:  # an isolated build: the report will say so
    torch = None

NAME = "t2t_fast._C"
DEFAULT_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0")
CPU_FLAGS = {
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx2", "-mfma", "-mf16c"],
}


def choice(variable: str, accepted: tuple[str, ...], default: str) -> str:
    """The value of an environment variable; anything unknown ends the installation."""
    value = os.environ.get(variable) or default
    if value not in accepted:
        raise SystemExit(f"{variable}={value!r} in the environment; accepted: {', '.join(accepted)}")
    return value


def why_not() -> str | None:
    """Why the extension is not built at all, or None."""
    if choice("T2T_FAST_NO_EXT", ("0", "1"), "0") == "1":
        return "T2T_FAST_NO_EXT=1 was set when t2t_fast was installed"
    if torch is None:
        return "torch could not be imported when t2t_fast was installed (pass --no-build-isolation)"
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler):
        return f"there was no C++ compiler ({compiler}) when t2t_fast was installed"
    return None


def why_no_cuda() -> str | None:
    """Why the extension is built without CUDA, or None."""
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    if cuda_home() is None:
        return "there was no CUDA toolkit (nvcc and headers, in CUDA_HOME or /usr/local/cuda) at installation"
    return None


def cuda_home() -> str | None:
    """The folder of a CUDA toolkit with nvcc and headers; torch's guess may be that of a mere wrapper of nvcc."""
    asked = os.environ.get("CUDA_HOME")
    for home in (asked,) if asked else filter(None, (cpp_extension.CUDA_HOME, "/usr/local/cuda")):
        if Path(home, "bin", "nvcc").exists() and Path(home, "include", "cuda_runtime_api.h").exists():
            return str(home)
    return None


def ask_nvcc(option: str) -> str:
    """What nvcc answers."""
    nvcc = Path(cpp_extension.CUDA_HOME, "bin", "nvcc")
    return subprocess.run([nvcc, option], capture_output=True, text=True, check=True).stdout


def architectures() -> str:
    """The value of TORCH_CUDA_ARCH_LIST: the default ones that this nvcc knows, with PTX of the last."""
    known = ask_nvcc("--list-gpu-arch").split()
    chosen = [arch for arch in DEFAULT_ARCHITECTURES if f"compute_{arch.replace('.', '')}" in known]
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(chosen) + "+PTX"


def cpu_capability() -> str:
    """The instruction set to compile for; torch's vectors have others than these, for which DEFAULT serves."""
    machine = torch.backends.cpu.get_cpu_capability()
    return choice("T2T_FAST_CPU_CAPABILITY", tuple(CPU_FLAGS), machine if machine in CPU_FLAGS else "DEFAULT")


def describe(cuda: bool) -> dict[str, str]:
    """What the extension is to be built with."""
    return {
        "torch": torch.__version__,
        "cpu_capability": cpu_capability(),
        "cuda": torch.version.cuda if cuda else "",
        "architectures": architectures() if cuda else "",
    }


def extension(cuda: bool) -> Extension:
    """The extension, with or without its CUDA sources."""
    info = describe(cuda)
    capability = info["cpu_capability"]
    common = ["-O3", "-std=c++20"]
    threads = ["-fopenmp"] if sys.platform == "linux" else []  # without, at::parallel_for is a plain loop
    cxx = [
        *common,
        *threads,
        "-fno-strict-aliasing",  # a unit of a bfloat16 matmul is a pair, stored as a float
        *CPU_FLAGS[capability],
        f"-DCPU_CAPABILITY={capability}",
        f"-DCPU_CAPABILITY_{capability}",
    ]
    macros = {"FLAGS": " ".join(cxx), "CPU_CAPABILITY": capability, "ARCHITECTURES": info["architectures"]}
    if cuda:
        macros["NVCC"] = ask_nvcc("--version").splitlines()[-1]
        cxx.append("-DT2T_FAST_CUDA")
        os.environ["TORCH_CUDA_ARCH_LIST"] = info["architectures"]
    cxx += [f'-DT2T_FAST_{name}="{value}"' for name, value in macros.items()]
    endings = ("*.cpp", "*.cu") if cuda else ("*.cpp",)
    sources = sorted(str(path) for ending in endings for path in Path("csrc").rglob(ending))
    make = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    flags = {"cxx": [*cxx, "-g0", "-Wno-unknown-pragmas", "-Wno-psabi"], "nvcc": [*common, "--threads=2"]}
    return make(NAME, sources, extra_compile_args=flags, extra_link_args=threads)


@contextlib.contextmanager
def recorded() -> Iterator[list[str]]:
    """What this process and its children print, also as lines in the list, once the block is left."""
    lines: list[str] = []
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        saved = os.dup(1), os.dup(2)
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        try:
            yield lines
        finally:
            sys.stdout.flush()
            for stream, original in zip((1, 2), saved, strict=True):
                os.dup2(original, stream)
                os.close(original)
            file.seek(0)
            text = file.read().decode(errors="replace")
            sys.stderr.write(text)
            lines += text.splitlines()


def main_error(lines: list[str], error: Exception) -> str:
    """The first line that names an error, or what was raised."""
    named = (line.strip() for line in lines if re.search(r"\b(fatal )?error\b:?", line, re.IGNORECASE))
    return next(named, f"{type(error).__name__}: {error}")[:500]


class BuildOptionalExtension(build_ext if torch is None else cpp_extension.BuildExtension):
    """Builds the extension with CUDA, without, or not at all, and writes down which and why."""

    def run(self) -> None:
        """Build; no failure of a compiler ends the installation."""
        report: dict[str, Any] = {"built": False, "reason": why_not()}
        if report["reason"] is None:
            no_cuda = why_no_cuda()
            if no_cuda is None:
                cpp_extension.CUDA_HOME = cuda_home()
                no_cuda = self.attempt(cuda=True)
            failure = self.attempt(cuda=False) if no_cuda else None
            report = {"built": failure is None, "reason": failure, "no_cuda": no_cuda, **describe(cuda=not no_cuda)}
        binary = Path(self.get_ext_fullpath(NAME))
        binary.parent.mkdir(parents=True, exist_ok=True)
        if not report["built"]:
            binary.unlink(missing_ok=True)  # an older build's, of other sources
            sys.stderr.write(f"t2t_fast's extension is not built: {report['reason']}\n")
        binary.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")

    def attempt(self, cuda: bool) -> str | None:
        """Build with or without CUDA; None, or what went wrong."""
        vars(self.extensions[0]).update(vars(extension(cuda)))
        inplace, compiler, output = self.inplace, self.compiler, []
        try:
            with recorded() as output:
                super().run()
        except Exception as error:  # of a compiler, of ninja, of torch's check of their versions
            return f"the {'CUDA' if cuda else 'C++'} build failed: {main_error(output, error)}"
        finally:
            self.inplace, self.compiler = inplace, compiler
        return None

    def get_outputs(self) -> list[str]:
        """The files for an installation record: what was built."""
        return [name for name in super().get_outputs() if Path(name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        """For an editable installation: none, since the file is written into the source tree itself."""
        return {}


setup(
    packages=[*find_packages(include=["t2t_fast", "t2t_fast.*"]), "t2t_fast.kernels"],
    package_dir={"t2t_fast.kernels": "kernels"},
    package_data={"t2t_fast": ["py.typed"]},
    ext_modules=[Extension(NAME, [])],  # its sources and flags are decided when it is built
    cmdclass={"build_ext": BuildOptionalExtension},
)
