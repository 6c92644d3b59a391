"""The SE-augmented MLP and the SE gate on the CPU: the definition, `aten`, the extension. See README.md here."""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from t2t_fast.bench.common import OneLineParser, UsageError, command_line, positive_int, result_path, write_json

# (images, tokens, channels, hidden channels); no hidden ones: the gate alone
SHAPES = ((128, 197, 64, 64), (32, 197, 384, 1152), (1, 197, 384, 1152), (32, 197, 384, 0), (1, 197, 384, 0))
DTYPES = ("float32", "bfloat16")
PARTS = ("forward", "training step")
BACKENDS = ("reference", "aten", "native")
PRODUCTS = "products"  # fc1 and fc2 alone, of the forward pass
ALLOCATORS = ("fresh", "grown")
RUNS_PER_BLOCK = 5
TOLERANCES = {"float32": 1e-5, "bfloat16": 3e-2}  # relative norm, of outputs or of all gradients

EXAMPLES = """\
examples:
  python benchmarks/se_mlp.py --output benchmarks/results
  python benchmarks/se_mlp.py --shapes 32,197,384,1152 --dtypes bfloat16

exit status: 0, 1 if the backends disagree, 2 if an argument is wrong
"""


def measure(shape: tuple[int, ...], dtype_name: str, part: str, allocator: str, blocks: int) -> dict[str, Any]:
    """Times in seconds of all backends, in alternating blocks of runs, and the largest error of any."""
    import torch

    from t2t_fast import ops

    torch.manual_seed(0)
    images, tokens, channels, hidden = shape
    reduced = max(1, channels // 16)
    sizes: list[tuple[int, ...]] = [(reduced, channels), (channels, reduced)]
    if hidden:
        sizes = [(hidden, channels), (hidden,), (channels, hidden), (channels,), *sizes]
    dtype = getattr(torch, dtype_name)
    tensors = [torch.randn(images, tokens, channels), *(torch.randn(size) / size[-1] ** 0.5 for size in sizes)]
    tensors = [t.to(dtype).requires_grad_(part == "training step") for t in tensors]
    grad = torch.randn(images, tokens, channels)
    function: Callable[..., torch.Tensor] = ops.se_mlp if hidden else ops.se_gate

    def run(backend: str, tensors: list[torch.Tensor] = tensors) -> list[torch.Tensor]:
        if part == "training step":
            return list(torch.autograd.grad(function(*tensors, backend=backend), tensors, grad.to(tensors[0].dtype)))
        with torch.inference_mode():
            if backend == PRODUCTS:
                return [ops.linear(ops.linear(tensors[0], tensors[1]), tensors[3])]
            return [function(*tensors, backend=backend)]

    if allocator == "grown":  # glibc keeps blocks up to the largest that was ever freed, 32 MiB at most
        torch.empty(31 << 20, dtype=torch.uint8).fill_(0)
    columns = (*BACKENDS, PRODUCTS) if hidden and part == "forward" else BACKENDS
    times: dict[str, list[float]] = {column: [] for column in columns}
    for _ in range(blocks):
        for column in columns:
            run(column)  # the first run of a block pays for the other's traces in caches and allocator
            times[column] += [_time(lambda: run(column)) for _ in range(RUNS_PER_BLOCK)]  # noqa: B023
    exact = run("reference", [t.detach().double().requires_grad_(t.requires_grad) for t in tensors])
    error = max(
        ((got.double() - want).norm() / want.norm()).item()
        for backend in BACKENDS
        for got, want in zip(run(backend), exact, strict=True)
    )
    case = {"shape": shape, "dtype": dtype_name, "part": part, "allocator": allocator}
    return {**case, "error": error, "passed": error <= TOLERANCES[dtype_name], "times": times}


def _time(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def shape_of(text: str) -> tuple[int, ...]:
    """An argparse type: four numbers, the last of which may be zero."""
    try:
        numbers = tuple(int(number) for number in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != 4 or min(numbers[:3]) < 1 or numbers[3] < 0:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted: images,tokens,channels,hidden (0: the gate alone)")
    return numbers


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = OneLineParser(
        prog="se_mlp.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=list(SHAPES), metavar="B,N,C,H")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--blocks", type=positive_int, default=4, metavar="N", help="of five runs; default: 4")
    parser.add_argument("--output", type=Path, metavar="JSON", help="file, or a folder for it")
    options = parser.parse_args(argv)
    try:
        path, result = _measure_all(options, argv)
        write_json(path, result)
    except UsageError as error:
        parser.error(str(error))
    table = Table("shape", "dtype", "part", "allocator", *(f"{name} (ms)" for name in (*BACKENDS, PRODUCTS)), "ratios")
    for row in result["rows"]:
        shown = [
            f"{1e3 * row['median_s'][name]:.2f}" if name in row["median_s"] else "" for name in (*BACKENDS, PRODUCTS)
        ]
        ratios = f"{row['to_reference']:.2f}, {row['to_aten']:.2f}" if row["passed"] else "wrong"
        shape = "x".join(str(number) for number in row["shape"])
        table.add_row(shape, row["dtype"], row["part"], row["allocator"], *shown, ratios)
    console = Console(width=140)
    console.print(table)
    console.print(f"ratios: reference and aten over native; {result['hardware']}; raw times in {path}")
    return 0 if all(row["passed"] for row in result["rows"]) else 1


def _measure_all(options: argparse.Namespace, argv: Sequence[str]) -> tuple[Path, dict[str, Any]]:

    from t2t_fast.env import collect_env

    env, date = collect_env(), datetime.now().astimezone()
    if not env["extension"]["loaded"]:
        raise UsageError(f"native: {env['extension']['reason']}")
    hardware = f"cpu {env['cpu']['model'] or 'unknown'}"
    path = result_path(options.output, f"se {hardware}", env, date)
    rows = []
    spawn = multiprocessing.get_context("spawn")
    cases = list(itertools.product(options.shapes, options.dtypes, PARTS, ALLOCATORS))
    for case in track(cases, console=Console(stderr=True)):
        # A process each: what an allocator has seen before changes what it costs to get memory from it.
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            row = pool.submit(measure, *case, options.blocks).result()
        row["median_s"] = {name: statistics.median(times) for name, times in row["times"].items()}
        for name in ("reference", "aten"):
            row[f"to_{name}"] = row["median_s"][name] / row["median_s"]["native"]
        rows.append(row)
    return path, {
        "benchmark": "se_mlp",
        "date": date.isoformat(timespec="seconds"),
        "command": command_line("se_mlp", argv),
        "device": "cpu",
        "hardware": hardware,
        "tolerances": TOLERANCES,
        "rows": rows,
        "environment": env,
    }


if __name__ == "__main__":
    sys.exit(main())
