"""The dtype of every intermediate: see docs/numerics.md."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of statistics, exponentials, sums and gates: float64 if any tensor is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matmul of ``x`` runs: autocast's if it is on, else that of ``x``."""
    if is_autocast(x):
        return torch.get_autocast_dtype(x.device.type) if x.dtype != torch.float64 else x.dtype
    return x.dtype


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``."""
    return _has_autocast(x.device.type) and torch.is_autocast_enabled(x.device.type)


@torch.compiler.assume_constant_result
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


@torch.compiler.assume_constant_result
def ieee_float32() -> bool:
    """Whether float32 matmuls must be IEEE float32; a compiled function keeps the answer from its compilation."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # it was set by torch.backends' newer switches, which the older getter refuses to read
        return torch.backends.cuda.matmul.fp32_precision != "tf32"


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context without autocast on the device of ``x``."""
    device_type = x.device.type
    if not _has_autocast(device_type):  # such as meta
        return contextlib.nullcontext()
    return torch.autocast(device_type=device_type, enabled=False)
