"""The best rates of a device: bytes per second of a large copy, operations per second of a large matmul."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from t2t_fast import ops


def median_seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a call after warm-up: on CUDA by events, with the L2 cache cleared; elsewhere by the clock."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(function, return_mode="median")) / 1e3
    return statistics.median(_times(function, device))


def _times(function: Callable[[], Any], device: torch.device, least: int = 5) -> list[float]:
    """Seconds of each of the calls that half a second allows, but of at least ``least`` calls."""
    times: list[float] = []
    function()
    started = time.perf_counter()
    while len(times) < least or (len(times) < 100 and time.perf_counter() - started < 0.5):
        before = time.perf_counter()
        function()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - before)
    return times


def bytes_per_second(device: torch.device) -> float:
    """Bytes per second of a large copy, read and written."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * source.numel() / median_seconds(lambda: target.copy_(source), device)


@torch.no_grad()
def operations_per_second(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second (two per multiply-accumulate) of a large matmul, by the faster library."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    # ops.linear takes oneDNN where `@` takes MKL.
    products: list[Callable[[], Any]] = [lambda: a @ b, lambda: ops.linear(a[None], b, None)]
    if device.type == "cuda":
        return 2 * side**3 / min(median_seconds(product, device) for product in products)
    return 2 * side**3 / min(min(_times(product, device)) for product in products)  # others may slow it down
