"""Whether Triton kernels can run on a device, or why not, in words a user can act on."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from ...config import triton_is_interpreted
from ...numerics import ieee_float32
from .autograd import is_exporting, is_transformed

_OLDEST = 80  # compute capability times ten: bfloat16 and asynchronous copies
_TOO_OLD = f"the GPU is too old: the kernels need compute capability {_OLDEST / 10} or newer"


def why_not(dtype: torch.dtype, x: Tensor, *others: Tensor | None) -> str | None:
    """Why an op whose matmuls are in ``dtype`` cannot run on ``x`` and ``others`` in Triton; None if it can."""
    if is_transformed():
        return "tracing, torch.func and forward-mode derivatives need library operations"
    if is_exporting():
        return "an exported program must run without this package"
    reason = _device_reason(x.device)
    if reason is not None:
        return reason
    if x.device.type == "cpu" and torch.bfloat16 in (x.dtype, dtype):
        return "Triton's interpreter multiplies bfloat16 wrongly; take float16 or float32"
    for other in others:
        if other is not None and other.device != x.device:
            return "the inputs are on different devices"
    return None


def why_not_auto(dtype: torch.dtype, x: Tensor) -> str | None:
    """Why ``auto`` does not take Triton for matmuls in ``dtype`` although it could."""
    if x.device.type == "cpu":
        return "the interpreter is for tests"
    if dtype == torch.float64:
        return "float64 matmuls are left to the library"
    if dtype == torch.float32 and ieee_float32():
        return "float32 matmuls without TF32 are left to the library until the kernels are measured there"
    return None


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def _device_reason(device: torch.device) -> str | None:
    if not _triton_is_installed():
        return "Triton is not installed (pip install triton)"
    if device.type == "cpu":
        if not triton_is_interpreted():
            return "the tensor is on the CPU; to test there, set TRITON_INTERPRET=1 before t2t_fast is imported"
        from ...kernels.launch import is_interpreted
        from ...kernels.soft_split import _soft_split_forward_kernel

        if not is_interpreted(_soft_split_forward_kernel):
            return "the tensor is on the CPU, and TRITON_INTERPRET=1 was set after the kernels were imported"
        return None
    if device.type not in ("cuda", "xpu"):  # ROCm's devices are of type cuda, too
        return "there are no Triton kernels for this type of device"
    if triton_is_interpreted():
        return "TRITON_INTERPRET=1 is set: the interpreter runs on the CPU"
    try:
        target, arch = _target(device)
    except (RuntimeError, AssertionError) as error:  # a fake tensor on a machine without a GPU
        return f"Triton finds no GPU: {' '.join(str(error).split())}"
    if target != "cuda":
        return "the kernels' configurations are for NVIDIA GPUs, and Triton compiles for another kind here"
    if int(arch) < _OLDEST:
        return _TOO_OLD
    return None


def _target(device: torch.device) -> tuple[str, int | str]:
    """What Triton compiles for on ``device``: the kind of GPU and its generation, as compute capability times ten."""
    import triton

    with torch.get_device_module(device).device(device):
        target = triton.runtime.driver.active.get_current_target()
    return target.backend, target.arch
