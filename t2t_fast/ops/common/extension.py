"""Load the extension ``t2t_fast._C``, or keep the real reason why not; whether its operators can run, in words.

It may be missing (no compiler, ``T2T_FAST_NO_EXT=1``, a failed build: the report that ``setup.py`` writes beside it
knows), or be built for another torch or another CPU, in which case it is not even opened.
"""

from __future__ import annotations

import functools
import importlib
import json
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .autograd import is_exporting, is_transformed

_BINARY = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
_REPORT = str(Path(_BINARY).with_suffix(".json"))
_HINT = "; to build it: pip install --no-build-isolation -e . in the sources, with a C++ compiler"
_CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")  # each can do what those before it do


def read_report(folder: Path) -> dict[str, Any]:
    """What ``setup.py`` wrote about its build into ``folder``; empty where it did not or the file is damaged."""
    try:
        report = json.loads((folder / _REPORT).read_text())
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def why_not_open(report: dict[str, Any], folder: Path) -> str | None:
    """Why the extension in ``folder`` must not be opened here, judged by the report of its build; None if it may."""
    if report and not report.get("built"):
        return f"the extension is not built: {report.get('reason')}{_HINT}"
    if not (folder / _BINARY).exists():
        others = sorted(path.name for path in folder.glob("_C.*.so"))
        found = f" (found: {', '.join(others)}, of another Python)" if others else ""
        return f"the extension is not built: there is no {_BINARY} beside the package's files{found}{_HINT}"
    if not report:
        return f"the extension's report {_REPORT} is missing or damaged{_HINT}"
    if report.get("torch") != torch.__version__:
        return f"the extension is built for torch {report.get('torch')}, and this is {torch.__version__}{_HINT}"
    built_for, here = str(report.get("cpu_capability")), torch.backends.cpu.get_cpu_capability()
    if built_for not in _CAPABILITIES[: _CAPABILITIES.index(here) + 1 if here in _CAPABILITIES else 1]:
        return f"the extension is built for {built_for} instructions, and this CPU is used with {here}{_HINT}"
    return None


def load(folder: Path, name: str = "t2t_fast._C") -> tuple[Any, str | None]:
    """The extension's module and None, or None and the reason why it cannot be loaded."""
    reason = why_not_open(read_report(folder), folder)
    if reason is not None:
        return None, reason
    try:
        return importlib.import_module(name), None
    except Exception as error:  # a missing symbol or library: whatever it is, its own words
        return None, f"the extension could not be loaded: {type(error).__name__}: {error}{_HINT}"


FOLDER = Path(__file__).resolve().parents[2]
module, why_not_loaded = load(FOLDER)


def _matmuls() -> frozenset[torch.dtype]:
    info = module.build_info() if module is not None else {"cpu_capability": "DEFAULT"}
    if info["cpu_capability"] == "DEFAULT":
        return frozenset()
    return frozenset((torch.float32, torch.bfloat16) if info["bfloat16"] else (torch.float32,))


_MATMULS = _matmuls()


def describe() -> dict[str, Any]:
    """The state of the extension for bug reports: ``built``, ``loaded``, the reasons, and what it was built with."""
    report = read_report(FOLDER)
    state: dict[str, Any] = {"built": bool(report.get("built")), "loaded": module is not None}
    if why_not_loaded is not None:
        state["reason"] = why_not_loaded
    if report.get("no_cuda"):
        state["no_cuda"] = report["no_cuda"]
    return state | (module.build_info() if module is not None else {})


def why_not(x: Tensor, *others: Tensor | None) -> str | None:
    """Why the extension cannot run an op on ``x`` and ``others``; None if it can."""
    if is_transformed():
        return "tracing, torch.func and forward-mode derivatives need library operations"
    if is_exporting():
        return "an exported program must run without this package"
    reason = _device_reason(x.device.type)
    if reason is not None:
        return reason
    for other in others:
        if other is not None and other.device != x.device:
            return "the inputs are on different devices"
    return None


@torch.compiler.assume_constant_result
def multiplies(device_type: str, dtype: torch.dtype) -> bool:
    """Whether the extension has fast matmuls of its own for this device and dtype."""
    return device_type == "cpu" and dtype in _MATMULS


def why_not_multiply(dtype: torch.dtype) -> str | None:
    """Why :func:`multiplies` is false on a CPU; None if it is true."""
    if dtype in _MATMULS:
        return None
    if dtype not in (torch.float32, torch.bfloat16):
        return "the extension's matmuls are for float32 and bfloat16"
    if dtype == torch.bfloat16:
        return "the extension's bfloat16 matmuls need a CPU with AVX512-BF16, and a build by GCC for AVX512"
    return "the extension is built without AVX2, for which its matmuls are written"


@torch.compiler.assume_constant_result
def num_threads() -> int:
    """How many threads the CPU's operators have; a compiled function keeps the answer it was compiled with."""
    return torch.get_num_threads()


@torch.compiler.assume_constant_result
def _device_reason(device_type: str) -> str | None:
    if module is None:
        return why_not_loaded
    if device_type == "cuda" and torch.version.hip is not None:
        return "the extension's kernels are for NVIDIA GPUs, and this torch is built for ROCm"
    if device_type == "cuda" and not _architectures():
        return _why_no_cuda()
    if device_type not in ("cpu", "cuda"):
        return "the extension has no code for this type of device"
    return None


@functools.cache
def _why_no_cuda() -> str:
    return f"the extension is built without CUDA: {read_report(FOLDER).get('no_cuda')}"


@functools.cache
def _architectures() -> str:
    return str(module.build_info()["architectures"]) if module is not None else ""
