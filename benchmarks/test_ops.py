"""`pytest benchmarks --benchmark-only`: every op and implementation, with pytest-benchmark's statistics.

Each benchmark's extra_info has the work and the time over its floor; kernels.py shows them as a table.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import t2t_fast
from t2t_fast.bench.cases import CASES, TOLERANCES, Case, exact_step, runners, sample_of, step, worst_error
from t2t_fast.bench.common import OP_VARIANTS
from t2t_fast.bench.rates import bytes_per_second, operations_per_second

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH, DTYPE = (128, torch.bfloat16) if DEVICE.type == "cuda" else (2, torch.float32)


@functools.cache
def rates() -> tuple[float, float]:
    """Bytes and operations per second of this device."""
    return bytes_per_second(DEVICE), operations_per_second(DTYPE, DEVICE)


@pytest.mark.parametrize("part", ["forward", "training"])
@pytest.mark.parametrize("variant", OP_VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(", ", "-").replace(" ", "_"))
def test_op(benchmark: Any, case: Case, variant: str, part: str) -> None:
    functions = runners(case)
    if variant not in functions:
        pytest.skip(f"{case.op} has no {variant} implementation")
    function, tensors = functions[variant], sample_of(case, BATCH, DTYPE, DEVICE)
    sample = sample_of(case, 2, DTYPE, DEVICE)

    def run() -> None:
        if part == "training":
            step(function, tensors)
        else:
            with torch.no_grad():
                function(tensors)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    try:
        assert worst_error(step(function, sample), exact_step(case, sample)) <= 4 * TOLERANCES[DTYPE]
        run()
    except t2t_fast.BackendUnavailable as error:
        pytest.skip(str(error))
    work = case.work(BATCH, DTYPE.itemsize)[part]
    benchmark.group = f"{case.name}, {part}"
    benchmark(run)
    floor = work.floor(*rates())
    benchmark.extra_info.update(flops=work.flops, bytes=work.bytes, floor_s=floor, batch_size=BATCH, dtype=str(DTYPE))
    if benchmark.stats:  # absent with --benchmark-disable
        benchmark.extra_info["over_floor"] = benchmark.stats.stats.median / floor
