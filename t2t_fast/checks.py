"""Argument checks whose messages name the argument, the value received and what is accepted."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.types import Device

from .numerics import is_autocast

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST = 2**31 - 1  # of counts and sizes


def factory_options(device: Device, dtype: torch.dtype | None) -> dict[str, Any]:
    """``device`` and ``dtype`` as keyword arguments, without those that are None: not every module takes them.

    Raises:
        TypeError: ``dtype`` is no floating-point dtype.
    """
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype!r}")
    options = {"device": device, "dtype": dtype}
    return {name: option for name, option in options.items() if option is not None}


def check_tensor(name: str, value: object, ndim: int | tuple[int, ...]) -> None:
    """Raise unless ``value`` is a dense floating-point tensor with one of the given numbers of dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} has layout {value.layout}; accepted: torch.strided (value.to_dense())")
    if value.dtype not in FLOAT_DTYPES:
        accepted = ", ".join(map(_word, FLOAT_DTYPES))
        raise TypeError(f"{name} has dtype {value.dtype}; accepted: {accepted}")
    accepted_ndim = (ndim,) if isinstance(ndim, int) else ndim
    if value.ndim not in accepted_ndim:
        wanted = " or ".join(str(n) for n in accepted_ndim)
        raise ValueError(f"{name} must have {wanted} dimensions, got {value.ndim} (shape {tuple(value.shape)})")


def check_shape(name: str, value: Tensor, shape: Sequence[int | torch.SymInt], meaning: str) -> None:
    """Raise unless ``value`` has exactly ``shape``; ``meaning`` spells the shape in words."""
    check_tensor(name, value, len(shape))
    if torch.jit.is_tracing():  # a tracer's sizes are tensors, and it would warn of each comparison
        return
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {meaning} = {tuple(shape)}, got {tuple(value.shape)}")


def check_same_device(name: str, value: Tensor, *others: tuple[str, Tensor | None]) -> None:
    """Raise unless the ``others``, pairs of name and tensor, are on the device of ``value``."""
    device = value.device
    for other_name, other in others:
        if other is not None and other.device != device:
            raise ValueError(f"{name} is on {device}, {other_name} on {other.device}; move one of them")


def check_alike(name: str, value: Tensor, *others: tuple[str, Tensor | None]) -> None:
    """Raise unless the ``others``, pairs of name and tensor, have the device and the dtype of ``value``.

    Under autocast dtypes may differ, for the ops cast; but not from or to float64.
    """
    dtype, device = value.dtype, value.device
    for other_name, other in others:
        if other is None or (other.dtype == dtype and other.device == device):
            continue
        check_same_device(name, value, (other_name, other))
        if other.dtype == dtype:
            continue
        if not is_autocast(value) or torch.float64 in (value.dtype, other.dtype):
            raise TypeError(
                f"{name} has dtype {_word(value.dtype)}, {other_name} {_word(other.dtype)}; cast one of them, or run "
                "under torch.autocast (which leaves float64 as it is)"
            )


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def as_pair(name: str, value: object, minimum: int) -> tuple[int, int]:
    """An integer or a pair of integers as a pair, each at least ``minimum``; see :func:`as_integer`."""
    items = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else (value, value)
    pair = [as_integer(item) for item in items]
    if len(pair) != 2 or pair[0] is None or pair[1] is None:
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}")
    if min(pair[0], pair[1]) < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value!r}")
    if any(type(item) is int and item > LARGEST for item in pair):
        raise ValueError(f"{name} must be at most {LARGEST}, got {value!r}")
    return pair[0], pair[1]


def check_count(name: str, value: object, minimum: int) -> int:
    """``value`` as a plain int; raise unless it is an integer of at least ``minimum``. See :func:`as_integer`."""
    count = as_integer(value)
    if count is None:
        raise TypeError(f"{name} must be an int, got {value!r}")
    if count < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {count}")
    if count > LARGEST:
        raise ValueError(f"{name} must be at most {LARGEST}, got {count}")
    return count


def as_integer(value: object) -> int | None:
    """Anything with ``__index__`` (NumPy's integers, too) as a plain int; None for everything else, and for bools.

    Sizes that a graph leaves open stay what they are: ``torch.SymInt``, and tensors while ``torch.jit.trace`` runs.
    """
    if type(value) is int or isinstance(value, torch.SymInt) or (torch.jit.is_tracing() and isinstance(value, Tensor)):
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or getattr(value, "dtype", None) is torch.bool:
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def check_real(name: str, value: object) -> float:
    """``value`` as a float; raise unless it is a finite real number (NumPy's are taken, truth values are not)."""
    # A compiler may leave a number open, and then cannot ask.
    if type(value) is float and (torch.compiler.is_compiling() or math.isfinite(value)):
        return value
    number = _as_real(name, value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return number


def check_epsilon(name: str, value: object) -> float:
    """``value`` as a float; raise unless it is a finite number that is not negative."""
    number = check_real(name, value)
    if number < 0:
        raise ValueError(f"{name} must be at least 0, got {value!r}")
    return number


def check_probability(name: str, value: object) -> float:
    """``value`` as a float; raise unless it is a dropout rate."""
    rate = _as_real(name, value)
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value}")
    return rate


def _as_real(name: str, value: object) -> float:
    if not isinstance(value, (int, float, numbers.Real)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name} must be finite, got a number that no float holds") from error


def check_flag(name: str, value: object) -> None:
    """Raise unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
