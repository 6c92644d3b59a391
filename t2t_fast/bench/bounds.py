"""Lower bounds of a kernel's time on a chip that is not there, by its instructions.

A multiprocessor issues at most four warp instructions per cycle. So many warps times so many instructions cannot take
less, whatever the memory does; how many programs a multiprocessor holds, and how full the last wave of them is, say how
far above this bound a kernel will lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import triton

from t2t_fast.bench.sass import Loop
from t2t_fast.kernels.launch import MULTIPROCESSORS, Launch

ISSUED_PER_CYCLE = 4
BATCHES = (1, 8, 32, 128, 200)


@dataclass(frozen=True)
class Chip:
    """What of a GPU matters here; sizes per multiprocessor."""

    name: str
    multiprocessors: int
    hertz: float
    shared_bytes: int
    bytes_per_second: float
    flops_per_second: Mapping[str, float]  # of matmuls in 16 bits, TF32 and float32

    registers: int = 65536
    warps: int = 64
    programs: int = 32


CHIPS = {
    80: Chip(
        "A100", MULTIPROCESSORS[80], 1.41e9, 164 * 1024, 2.0e12, {"half": 280e12, "tf32": 140e12, "float32": 19e12}
    ),
    90: Chip(
        "H100", MULTIPROCESSORS[90], 1.7e9, 228 * 1024, 3.35e12, {"half": 800e12, "tf32": 400e12, "float32": 60e12}
    ),
}


def resident(chip: Chip, num_warps: int, registers: int, shared_bytes: int) -> int:
    """How many programs of ``num_warps`` a multiprocessor holds at a time."""
    per_warp = 32 * 8 * math.ceil(registers / 8)
    by_registers = chip.registers // per_warp // num_warps
    by_shared = chip.shared_bytes // (shared_bytes + 1024)  # of which the driver takes one KiB
    return min(by_registers, by_shared, chip.warps // num_warps, chip.programs)


def trips(launch: Launch) -> list[float]:
    """How often each loop of the kernel runs in a program on the average, in the order of the source."""
    given = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | {"grid": launch.grid}
    name = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")
    count = _TRIPS.get(name)
    return [] if count is None else count(given, launch.config.blocks, launch.constants.get("WINDOW"))


def _of_tokens(given: dict[str, Any], blocks: Any, window: Any) -> list[float]:
    """Of a kernel that walks over one of the ranges of an image's tokens."""
    sizes, (_, ranges) = given["sizes"], given["grid"]
    left = (min(sizes.per_split, sizes.tokens - index * sizes.per_split) for index in range(ranges))
    return [sum(triton.cdiv(tokens, blocks["BLOCK_TOKENS"]) for tokens in left if tokens > 0) / ranges]


def _of_taps(given: dict[str, Any], blocks: Any, window: Any) -> list[float]:
    """Of the image's gradient: the windows that cover a pixel, and the outputs of each."""
    taps = window.kernel_h * window.kernel_w / (window.stride_h * window.stride_w)
    return [taps, taps * triton.cdiv(given["out_features"], blocks["BLOCK_OUT"])]


# Outer loops come before the loops inside of them.
_TRIPS: dict[str, Callable[[dict[str, Any], Any, Any], list[float]]] = {
    "soft_split_linear_forward": lambda given, blocks, _: [given["weight_stride"] / blocks["BLOCK_FEATURES"]],
    "soft_split_linear_backward_weight": lambda given, blocks, _: [
        given["num_tokens"] / given["grid"][0] / blocks["BLOCK_TOKENS"]
    ],
    "soft_split_linear_coefficient": lambda given, blocks, _: [triton.cdiv(given["out_features"], blocks["BLOCK_OUT"])],
    "soft_split_linear_backward_input": _of_taps,
    "add_layer_norm_backward": lambda given, blocks, _: [given["tokens_per_split"] / blocks["BLOCK_TOKENS"]],
    "performer_attention_summary": _of_tokens,
    "performer_attention_combine": lambda given, blocks, _: [given["num_parts"]],
    "performer_attention_query": _of_tokens,
    "performer_attention_backward_query": _of_tokens,
    "performer_attention_backward_key": _of_tokens,
    "token_performer": _of_tokens,
    "token_performer_backward": _of_tokens,
}


def executed(kernel: Loop, launch: Launch) -> float:
    """Instructions that one warp executes on the average.

    Raises:
        ValueError: The compiled kernel has other loops than its source.
    """
    loops, counts = kernel.walk()[1:], trips(launch)
    if len(loops) != len(counts):
        raise ValueError(f"{launch.kernel.__name__} was compiled with {len(loops)} loops, and has {len(counts)}")
    return kernel.instructions + sum(loop.instructions * count for loop, count in zip(loops, counts, strict=True))


def seconds(chip: Chip, kernel: Loop, launch: Launch) -> float:
    """The bound of the whole launch."""
    warps = launch.config.num_warps * math.prod(launch.grid)
    return executed(kernel, launch) * warps / (ISSUED_PER_CYCLE * chip.multiprocessors * chip.hertz)


def waves(chip: Chip, launch: Launch, programs: int) -> float:
    """The launch's programs over those that the chip holds at a time, ``programs`` per multiprocessor."""
    return math.prod(launch.grid) / (programs * chip.multiprocessors)
