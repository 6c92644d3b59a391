"""Argument checks whose messages name the argument, the value received and what is accepted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class UsageError(Exception):
    """A command line asks for what cannot be done; the message is one line that says why and what can."""


def check_tensor(name: str, value: object, ndim: int | tuple[int, ...]) -> None:
    """Raise unless ``value`` is a floating-point tensor with one of the given numbers of dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOAT_DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
        raise TypeError(f"{name} has dtype {value.dtype}; accepted: {accepted}")
    accepted_ndim = (ndim,) if isinstance(ndim, int) else ndim
    if value.ndim not in accepted_ndim:
        wanted = " or ".join(str(n) for n in accepted_ndim)
        raise ValueError(f"{name} must have {wanted} dimensions, got {value.ndim} (shape {tuple(value.shape)})")


def check_shape(name: str, value: Tensor, shape: Sequence[int | torch.SymInt], meaning: str) -> None:
    """Raise unless ``value`` has exactly ``shape``; ``meaning`` spells the shape in words."""
    check_tensor(name, value, len(shape))
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {meaning} = {tuple(shape)}, got {tuple(value.shape)}")


def as_pair(name: str, value: int | Sequence[int], minimum: int) -> tuple[int, int]:
    """An int or a pair of ints as a pair, each at least ``minimum``."""
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    is_pair = len(pair) == 2 and all(isinstance(v, (int, torch.SymInt)) and not isinstance(v, bool) for v in pair)
    if not is_pair or isinstance(value, bool):
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}")
    if min(pair) < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value!r}")
    return pair[0], pair[1]


def check_count(name: str, value: object, minimum: int) -> None:
    """Raise unless ``value`` is an int of at least ``minimum``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_probability(name: str, value: float) -> None:
    """Raise unless ``value`` is a dropout rate."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value}")
