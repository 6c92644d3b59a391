"""Time every op as T2T-ViT-14 uses it, in every implementation, and compare with a floor.

    python benchmarks/kernels.py                                    # batch 128, bfloat16 on a GPU; 4, float32 on a CPU
    python benchmarks/kernels.py --ops soft_split_linear mlp --dtype float16 --output benchmarks/results

The floor is the time for the bytes (each read or written once) or for the operations, whichever is longer, at the
rates of a large copy and a large matmul measured in the same run. `aten` is the best that libraries offer: cuDNN's
convolution for the soft splits, scaled_dot_product_attention for attention, cuBLAS or oneDNN for matmuls. A wrong
result or gradient shows its error instead of a time, and the exit status is 1. The file is written after every op.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

import t2t_fast
from t2t_fast.bench.cases import CASES, TOLERANCES, Case, exact_step, runners, sample_of, step, worst_error
from t2t_fast.bench.common import (
    OUTPUT_HELP,
    command_line,
    new_result,
    positive_int,
    positive_seconds,
    result_path,
    write_json,
)
from t2t_fast.bench.measuring import device_name, failure, give_back, select_device
from t2t_fast.bench.rates import bytes_per_second, median_seconds, operations_per_second
from t2t_fast.bench.samples import Sample
from t2t_fast.bench.terminal import Console, Table, track, wide_console
from t2t_fast.env import collect_env
from t2t_fast.usage import OneLineParser, UsageError


def measure(case: Case, batch: int, dtype: torch.dtype, device: torch.device, compiled: bool) -> list[dict[str, Any]]:
    """A row per variant: the error against the reference in float64, and seconds of forward and of training."""
    rows, whole, sample, want = list[dict[str, Any]](), Sample(), Sample(), list[torch.Tensor]()
    for variant, function in runners(case).items():
        if variant == "reference, compiled" and not compiled:
            continue
        row: dict[str, Any] = {"op": case.op, "use": case.use, "variant": variant, "passed": True, "status": "ok"}
        rows.append(row)
        try:
            sample = sample or sample_of(case, min(batch, 4), dtype, device)
            want = want or exact_step(case, sample)
            error = worst_error(step(function, sample), want)
            # Gradients that cancel have large errors in the reference, too: accept twice those, within a limit.
            literal = 2 * (rows[0].get("error") or 0.0) if row is not rows[0] else 4 * TOLERANCES[dtype]
            row["tolerance"] = min(max(TOLERANCES[dtype], literal), 4 * TOLERANCES[dtype])
            row["passed"] = error <= row["tolerance"]
            row["error"] = error if math.isfinite(error) else None
            if not row["passed"]:
                row["status"] = f"wrong: {error:.1e}"
                continue
            whole = whole or sample_of(case, batch, dtype, device)
            with torch.no_grad():
                row["forward_s"] = median_seconds(functools.partial(function, whole), device)
            row["training_s"] = median_seconds(functools.partial(step, function, whole), device)
        except t2t_fast.BackendUnavailable as error:
            row["status"] = f"cannot run: {error}"
        except Exception as error:  # compilers and drivers raise anything; the other rows go on
            row["status"] = failure(error)
            row["passed"] = row["status"] == "out of memory"
            give_back()
    return rows


def table_of(result: dict[str, Any]) -> Table:
    """Work and floor of every use, and each variant's time over the floor."""
    table = Table(
        "op", "use", "variant", "GFLOP", "MB", "forward", "over floor", "GFLOP", "MB", "training", "over floor"
    )
    for name, parts in result["work"].items():
        op, _, use = name.partition(", ")
        numbers = [f"{parts[p][key] / scale:.1f}" for p in parts for key, scale in (("flops", 1e9), ("bytes", 1e6))]
        floor = [duration(parts[p]["floor_s"]) for p in parts]
        table.add_row(op, use, "floor", *numbers[:2], floor[0], "", *numbers[2:], floor[1], "")
        for row in (row for row in result["rows"] if (row["op"], row["use"]) == (op, use)):
            cells = [op, use, row["variant"]]
            for part in parts:
                seconds = row.get(f"{part}_s")
                cells += ["", "", duration(seconds) if seconds else row["status"].partition(": ")[0]]
                cells.append(f"{seconds / parts[part]['floor_s']:.2f}" if seconds else "")
            table.add_row(*cells)
    return table


def duration(seconds: float) -> str:
    """In microseconds, or from 10 ms on in milliseconds."""
    return f"{seconds * 1e6:.0f} µs" if seconds < 0.01 else f"{seconds * 1e3:.1f} ms"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and return the exit status: 0, 1 if a result is wrong, 2 if an argument is impossible."""
    argv = list(sys.argv[1:] if argv is None else argv)
    known = tuple(dict.fromkeys(case.op for case in CASES))
    parser = OneLineParser(prog="kernels.py", description=__doc__)
    add = parser.add_argument
    add("--ops", nargs="+", default=list(known), choices=known, metavar="OP", help=f"default: {' '.join(known)}")
    add("--batch-size", type=positive_int, metavar="N", help="images; default: 128 on CUDA, 4 elsewhere")
    names = [str(dtype).removeprefix("torch.") for dtype in TOLERANCES]
    add("--dtype", choices=names, help="default: bfloat16 on CUDA, float32 elsewhere; float32 is TF32 on CUDA")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one")
    add("--time-budget", type=positive_seconds, metavar="SECONDS", help="start no further use after so long")
    add("--no-compile", action="store_true", help="leave out the reference under torch.compile")
    add("--output", type=Path, metavar="JSON", help=OUTPUT_HELP)
    options = parser.parse_args(argv)
    try:
        path, result = _measure_all(options, argv)
    except UsageError as error:
        parser.error(str(error))
    wide_console(150).print(table_of(result))
    for row in result["rows"]:
        if row["status"] != "ok":
            print(f"{row['op']}, {row['use']}, {row['variant']}: {row['status']}")
    print(f"results: {path}")
    return 0 if all(row["passed"] for row in result["rows"]) else 1


def _measure_all(options: argparse.Namespace, argv: list[str]) -> tuple[Path, dict[str, Any]]:
    started, date, env = time.perf_counter(), datetime.now().astimezone(), collect_env()
    device = select_device(options.device)
    on_gpu = device.type == "cuda"
    dtype = getattr(torch, options.dtype or ("bfloat16" if on_gpu else "float32"))
    batch = options.batch_size or (128 if on_gpu else 4)
    hardware = device_name(device, env)
    path = result_path(options.output, f"kernels {hardware}", env, date)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if on_gpu else precision)
    try:
        rates = bytes_per_second(device), operations_per_second(dtype, device)
        result = new_result(
            "kernels",
            date,
            command_line("kernels", argv, ("--output", "--time-budget")),
            env,
            device=device.type,
            hardware=hardware,
            dtype=str(dtype).removeprefix("torch."),
            batch_size=batch,
            bytes_per_second=rates[0],
            flops_per_second=rates[1],
            work={},
        )
        cases = [case for case in CASES if case.op in options.ops]
        for case in track(cases, "measuring", console=Console(stderr=True), transient=True):
            if options.time_budget and time.perf_counter() - started > options.time_budget:
                break
            work = case.work(batch, dtype.itemsize)
            result["work"][case.name] = {
                name: asdict(cost) | {"floor_s": cost.floor(*rates)} for name, cost in work.items()
            }
            result["rows"] += measure(case, batch, dtype, device, not options.no_compile)
            write_json(path, result)
    finally:
        torch.set_float32_matmul_precision(precision)
    return path, result


if __name__ == "__main__":
    sys.exit(main())
