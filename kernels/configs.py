"""Tables of block sizes, warps and pipeline stages, per chip and kind of arithmetic. Nothing is tuned at run time.

The keys are compute capabilities times ten; a chip without an entry takes that of the newest older chip. No
configuration has been measured on a GPU yet: they are the large ones that compile without spilling registers, which
``benchmarks/resources.py`` checks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import triton

from .launch import Config, chip_of, precision


@dataclass(frozen=True, eq=False)  # a cache key, compared by identity
class Table:
    """Compute capability times ten to kind of arithmetic to configuration.

    Kinds are 16-bit operands ("half"), TF32, IEEE float32 and float64. A block ``rest`` is more outputs of the same
    program, where they fit exactly: three times 64 need no block of 256.
    """

    rows: Mapping[int, Mapping[str, Config | None]]


def _config(num_warps: int, num_stages: int, *, tuned: str | None = None, resident: int = 1, **blocks: int) -> Config:
    sizes = {f"BLOCK_{name.upper()}": size for name, size in blocks.items()}
    return Config(sizes, num_warps, num_stages, tuned, resident)


SOFT_SPLIT_LINEAR_FORWARD = Table(
    {
        80: {
            "half": _config(4, 3, tokens=64, features=16, out=128, rest=64),
            "tf32": _config(8, 2, tokens=64, features=32, out=128, rest=0),
            "float32": _config(8, 1, tokens=64, features=16, out=64, rest=0),
            "float64": _config(4, 1, tokens=32, features=16, out=32, rest=0),
        },
        89: {"float32": _config(4, 1, tokens=64, features=16, out=64, rest=0)},
        90: {
            "half": _config(4, 3, tokens=64, features=32, out=128, rest=64),
            "float32": _config(8, 1, tokens=32, features=16, out=64, rest=0),
        },
        100: {"tf32": _config(8, 1, tokens=64, features=32, out=128, rest=0)},
        120: {"half": _config(4, 3, tokens=64, features=16, out=128, rest=64)},
    }
)
SOFT_SPLIT_LINEAR_BACKWARD_WEIGHT = Table(
    {
        80: {
            "half": _config(8, 3, tokens=32, features=64, out=128, rest=64),
            "tf32": _config(8, 2, tokens=32, features=64, out=128, rest=0),
            "float32": _config(8, 1, tokens=16, features=64, out=64, rest=0),
            "float64": _config(4, 1, tokens=16, features=32, out=32, rest=0),
        },
        90: {
            "half": _config(8, 3, tokens=64, features=64, out=128, rest=64, resident=2),
            "float32": _config(8, 1, tokens=16, features=32, out=64, rest=0),
        },
        100: {"half": _config(4, 2, tokens=64, features=64, out=128, rest=0)},
        120: {"half": _config(8, 3, tokens=32, features=64, out=128, rest=0)},
    }
)
SOFT_SPLIT_LINEAR_BACKWARD_INPUT = Table(
    {
        80: {
            "half": _config(8, 2, pixels=64, channels=64, out=64),
            "tf32": _config(8, 2, pixels=64, channels=64, out=32),
            "float32": _config(8, 1, pixels=64, channels=64, out=16),
            "float64": _config(4, 1, pixels=32, channels=32, out=16),
        },
        90: {"half": _config(4, 4, pixels=64, channels=64, out=64)},
        100: {"tf32": _config(8, 1, pixels=64, channels=64, out=16)},
    }
)
# The Performer's other blocks cover all features and all channels.
PERFORMER_ATTENTION = Table(
    {
        80: {
            "half": _config(4, 1, tokens=64, resident=2),
            "tf32": _config(4, 2, tokens=64, resident=2),
            "float32": _config(4, 1, tokens=32),
            "float64": _config(4, 1, tokens=16),
        },
        90: {"half": _config(4, 1, tokens=64, resident=3), "tf32": _config(4, 1, tokens=64, resident=2)},
        100: {"tf32": _config(4, 2, tokens=32)},
    }
)
PERFORMER_ATTENTION_BACKWARD = Table(
    {
        80: {
            "half": _config(8, 1, tokens=32),
            "tf32": _config(8, 1, tokens=32),
            "float32": _config(4, 1, tokens=16),
            "float64": _config(4, 1, tokens=16),
        },
        90: {"float32": _config(2, 1, tokens=16)},
        100: {"float32": _config(4, 1, tokens=16)},
    }
)
# The gradient of keys and values, where w is not learned.
PERFORMER_ATTENTION_BACKWARD_KEY = Table(
    {
        80: {
            "half": _config(4, 1, tokens=32, resident=2),
            "tf32": _config(8, 1, tokens=32),
            "float32": _config(8, 1, tokens=16),
            "float64": _config(4, 1, tokens=16),
        },
        90: {"half": _config(4, 1, tokens=64, resident=2)},
        100: {"half": _config(4, 1, tokens=32, resident=2)},
    }
)
# Row 0 is the interpreter's. None: weights, or their gradients, do not fit the registers or the shared memory.
TOKEN_PERFORMER = Table(
    {
        0: {"float32": _config(4, 1, tokens=16), "float64": _config(4, 1, tokens=16)},
        80: {
            "half": _config(4, 1, tokens=32, resident=2),
            "tf32": _config(4, 1, tokens=32),
            "float32": None,
            "float64": None,
        },
        90: {"half": _config(4, 1, tokens=64, resident=2)},
        100: {"half": _config(4, 2, tokens=32)},
    }
)
TOKEN_PERFORMER_BACKWARD = Table(
    {
        0: {"float32": _config(4, 1, tokens=16), "float64": _config(4, 1, tokens=16)},
        80: {
            "half": _config(8, 1, tokens=16),
            "tf32": _config(8, 1, tokens=16),
            "float32": None,
            "float64": None,
        },
        86: {"tf32": None},  # 99 KiB of shared memory are not enough
        90: {"tf32": _config(8, 1, tokens=16)},
        120: {"half": None, "tf32": None},
    }
)
# All channels of a token in one block; the kind is that of the sum.
ADD_LAYER_NORM = Table({80: {kind: _config(4, 1, tokens=4) for kind in ("half", "tf32", "float32", "float64")}})
ADD_LAYER_NORM_BACKWARD = Table(
    {
        80: {kind: _config(8, 1, tokens=4) for kind in ("half", "tf32", "float32", "float64")},
        100: {kind: _config(8, 1, tokens=2) for kind in ("tf32", "float32")},
        120: {kind: _config(8, 1, tokens=4) for kind in ("tf32", "float32")},
    }
)
SOFT_SPLIT_LINEAR_COEFFICIENT = _config(4, 1, tokens=32, out=128)


def kind(dtype: torch.dtype) -> str:
    """The kind of arithmetic of matmuls of ``dtype`` under the current precision setting."""
    if dtype.itemsize == 2:
        return "half"
    return "tf32" if precision(dtype) == "tf32" else str(dtype).removeprefix("torch.")


def pick(table: Table, device: torch.device, dtype: torch.dtype, **sizes: int) -> Config:
    """The configuration for the chip of ``device``, with blocks no larger than ``sizes`` require."""
    config = _pick(table, chip_of(device).arch, kind(dtype), tuple(sizes.items()))
    assert config is not None, "ask has_config first"
    return config


def has_config(table: Table, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the table's kernel exists for ``dtype`` on the chip of ``device``."""
    return _pick(table, chip_of(device).arch, kind(dtype), ()) is not None


@functools.lru_cache(maxsize=1024)
def _pick(table: Table, arch: int, wanted: str, sizes: tuple[tuple[str, int], ...]) -> Config | None:
    # Newest first. The interpreter (0) takes missing entries from the oldest chip.
    rows = [row for a, row in sorted(table.rows.items(), reverse=True) if a <= arch]
    rows += [row for a, row in sorted(table.rows.items()) if a > arch]
    config = next(row[wanted] for row in rows if wanted in row)
    if config is None:
        return None
    blocks = dict(config.blocks)
    for name, size in sizes:
        key = f"BLOCK_{name.upper()}"
        if name == "out" and (size <= blocks[key] or size % (blocks[key] + blocks["BLOCK_REST"]) != 0):
            blocks["BLOCK_REST"] = 0
        blocks[key] = min(blocks[key], max(16, triton.next_power_of_2(size)))
    return replace(config, blocks=blocks)
