"""One launch of a kernel, as a value: it can be run, or only compiled, with the very same arguments."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton

from ..numerics import ieee_float32


class Chip(NamedTuple):
    """What configurations depend on: compute capability times ten (0 for the interpreter) and multiprocessors."""

    arch: int
    multiprocessors: int


# Of the A100 and the H100, to compile and count without one.
MULTIPROCESSORS = {80: 108, 90: 132}


def chip_of(device: torch.device) -> Chip:
    """The chip behind ``device``.

    The CPU stands for Triton's interpreter, and meta for the active driver's target, to compile ahead of time.
    """
    if device.type == "meta":
        arch = triton.runtime.driver.active.get_current_target().arch
        return Chip(arch, MULTIPROCESSORS.get(arch, 128))
    return _chip_of(device)


@functools.cache
def _chip_of(device: torch.device) -> Chip:
    if device.type == "cpu":
        return Chip(0, 4)
    properties = torch.cuda.get_device_properties(device)
    return Chip(10 * properties.major + properties.minor, properties.multi_processor_count)


@dataclass(frozen=True)
class Config:
    """Block sizes by the names of a kernel's constants, and how it is compiled.

    ``resident`` is how many of its programs a multiprocessor holds at a time, where their number can be chosen.
    ``tuned`` names the chip that it was measured best on; None marks a configuration that nobody has measured.
    """

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int
    tuned: str | None = None
    resident: int = 1


# What a program does before and behind its loop, in blocks of its loop.
_OVERHEAD = 1
_MOST_WAVES = 8


@functools.lru_cache(maxsize=1024)
def num_ranges(programs: int, blocks: int, places: int) -> int:
    """Into how many ranges to divide the ``blocks`` of work of each of ``programs``: the number that ends first.

    ``places`` programs run at a time. The last wave of them is as long as the others, however few it holds.
    """
    most = max(1, min(blocks, _MOST_WAVES * places // max(1, programs)))

    def time(ranges: int) -> int:
        return triton.cdiv(programs * ranges, places) * (triton.cdiv(blocks, ranges) + _OVERHEAD)

    return min(range(1, most + 1), key=time)


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid, its arguments and its configuration."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: Mapping[str, Any]
    config: Config

    def _options(self) -> dict[str, Any]:
        return {
            **self.constants,
            **self.config.blocks,
            "num_warps": self.config.num_warps,
            "num_stages": self.config.num_stages,
        }

    def run(self, device: torch.device) -> None:
        """Enqueue on the current stream of ``device``; nothing happens for an empty grid."""
        if 0 in self.grid:
            return
        if device.type == "cpu":
            self.kernel[self.grid](*self.args, **self._options())
            return
        with torch.get_device_module(device).device(device):
            self.kernel[self.grid](*self.args, **self._options())

    def compile(self) -> Any:
        """Compile for the active driver's target, with the specialisation that :meth:`run` would have."""
        return self.kernel.warmup(*self.args, grid=self.grid, **self._options())


def is_interpreted(kernel: Any) -> bool:
    """Whether ``kernel`` runs in Triton's interpreter: TRITON_INTERPRET=1 was set when it was imported."""
    return not isinstance(kernel, triton.runtime.JITFunction)


def block_size_for(size: int) -> int:
    """The smallest block, a power of two and at least 16, that holds all of ``size``."""
    return max(16, triton.next_power_of_2(size))


def precision(dtype: torch.dtype) -> str:
    """How ``tl.dot`` multiplies values of ``dtype``: float32 obeys torch.get_float32_matmul_precision()."""
    return "tf32" if dtype == torch.float32 and not ieee_float32() else "ieee"
