"""Describe this environment: versions, devices and the state of the extension, for bug reports and result files."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_CLOCKS = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
_PACKAGES = ("torchvision", "timm", "triton", "numpy", "onnxruntime", "openvino", "nncf")


def collect_env() -> dict[str, Any]:
    """Describe this environment as plain data, ready for `json.dump`.

    CUDA is initialised only where a device is available.
    """
    import torch

    from t2t_fast import __version__
    from t2t_fast.ops.common import extension

    return {
        "t2t_fast": __version__,
        "git": _git_state(Path(__file__).resolve().parents[1]),
        "extension": extension.describe(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **{name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu": {
            "model": _cpu_model(),
            "count": os.cpu_count(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "torch_threads": torch.get_num_threads(),
        },
        "cuda_build": torch.version.cuda,
        "driver": _driver(),
        "gpus": _gpus(),
        "clocks": _output("nvidia-smi", f"--query-gpu={_CLOCKS}", "--format=csv,noheader"),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith("T2T_FAST_")},
    }


def format_env(env: dict[str, Any]) -> str:
    """Write the result of `collect_env` for people, one fact per line."""
    width = max(map(len, env))
    return "\n".join(f"{name:<{width}}  {_format(value)}" for name, value in env.items())


def _format(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_format(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list):
        return "; ".join(map(_format, value)) or "none"
    return "none" if value is None else str(value)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """The output of a command; None if the command is missing, fails or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _git_state(root: Path) -> dict[str, Any] | None:
    """The checkout's commit, and whether it has changes; None for an installed package."""
    if not (root / ".git").exists():
        return None
    status = _output("git", "-C", str(root), "status", "--porcelain")
    return {
        "commit": _output("git", "-C", str(root), "rev-parse", "--verify", "HEAD"),
        "dirty": None if status is None else bool(status),
    }


def _cpu_model() -> str | None:
    """The CPU's name; with family and model if the name has no number, as on many virtual machines."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()]
    except OSError:
        return platform.processor() or None
    facts = {name.strip(): value.strip() for name, _, value in lines}
    name = facts.get("model name") or platform.processor() or None
    if name is None or any(c.isdigit() for c in name) or not {"cpu family", "model"} <= facts.keys():
        return name
    return f"{name}, family {facts['cpu family']} model {facts['model']}"


def _driver() -> str | None:
    drivers = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return drivers.splitlines()[0] if drivers else None


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        {
            "name": device.name,
            "compute_capability": f"{device.major}.{device.minor}",
            "memory_gib": round(device.total_memory / 2**30, 1),
        }
        for device in devices
    ]
