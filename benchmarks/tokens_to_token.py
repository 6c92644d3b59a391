"""How much faster `auto` is than the definition: the tokens-to-token module and whole models. See README.md here."""

from __future__ import annotations

import argparse
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

MODELS = ("t2t_vit_14", "t2t_vit_t_14")
PARTS = ("module forward", "module training step", "model forward")
BACKENDS = ("reference", "auto")
RUNS_PER_BLOCK = 5
TOLERANCE = 1e-5  # relative norm in float32, of outputs or of weight gradients

EXAMPLES = """\
examples:
  python benchmarks/tokens_to_token.py
  python benchmarks/tokens_to_token.py --models t2t_vit_7 --batch-size 8 --blocks 3

exit status: 0, 1 if the backends disagree, 2 if an argument is
"""


def measure(model: str, part: str, batch_size: int, blocks: int) -> dict[str, Any]:
    """Times in seconds of both backends on the CPU in float32, in alternating blocks of runs, and their difference."""
    import torch

    import t2t_fast

    torch.manual_seed(0)
    models = {backend: t2t_fast.create_model(model, backend=backend).eval() for backend in BACKENDS}
    models["auto"].load_state_dict(models["reference"].state_dict())
    images = torch.randn(batch_size, 3, 224, 224)

    def run(backend: str) -> Any:
        net: Any = models[backend]
        if part == "module training step":
            net.zero_grad()
            out = net.tokens_to_token(images)
            out.backward(torch.ones_like(out))
            return torch.cat([p.grad.flatten() for p in net.tokens_to_token.parameters() if p.grad is not None])
        with torch.inference_mode():
            return net.tokens_to_token(images) if part == "module forward" else net(images)

    want, got = (run(backend) for backend in BACKENDS)
    error = ((got - want).norm() / want.norm()).item()
    del want, got
    if part == "module training step":  # checked without dropout, timed with it
        for net in models.values():
            net.train()
    times: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    for _ in range(blocks):
        for backend in BACKENDS:
            run(backend)  # the first run of a block pays for the other's traces in caches and allocator
            times[backend] += [_time(lambda: run(backend)) for _ in range(RUNS_PER_BLOCK)]  # noqa: B023
    return {"model": model, "part": part, "error": error, "passed": error <= TOLERANCE, "times": times}


def _time(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = OneLineParser(
        prog="tokens_to_token.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME")
    parser.add_argument("--batch-size", type=positive_int, default=16, metavar="N", help="default: 16")
    parser.add_argument("--blocks", type=positive_int, default=4, metavar="N", help="of five runs; default: 4")
    parser.add_argument("--output", type=Path, metavar="JSON", help="file, or a folder for it")
    options = parser.parse_args(argv)
    try:
        path, result = _measure_all(options, argv)
        write_json(path, result)
    except UsageError as error:
        parser.error(str(error))
    table = Table("model", "part", *(f"{backend} (ms)" for backend in BACKENDS), "ratio", "difference")
    for row in result["rows"]:
        cells = [f"{1e3 * row['median_s'][backend]:.0f}" for backend in BACKENDS]
        shown = [*cells, f"{row['ratio']:.2f}x"] if row["passed"] else ["-", "-", "wrong"]
        table.add_row(row["model"], row["part"], *shown, f"{row['error']:.1e}")
    console = Console(width=100)
    console.print(table)
    console.print(f"float32, {options.batch_size} images of 224 px, {result['hardware']}; raw times in {path}")
    return 0 if all(row["passed"] for row in result["rows"]) else 1


def _measure_all(options: argparse.Namespace, argv: Sequence[str]) -> tuple[Path, dict[str, Any]]:

    import t2t_fast
    from t2t_fast.env import collect_env

    unknown = [name for name in options.models if name not in t2t_fast.list_models()]
    if unknown:
        raise UsageError(f"--models: {unknown[0]!r} is unknown; accepted: {', '.join(t2t_fast.list_models())}")
    env, date = collect_env(), datetime.now().astimezone()
    hardware = f"cpu {env['cpu']['model'] or 'unknown'}"
    path = result_path(options.output, f"t2t {hardware}", env, date)
    rows = []
    spawn = multiprocessing.get_context("spawn")
    for model, part in track([(m, p) for m in options.models for p in PARTS], console=Console(stderr=True)):
        # A process each: what an allocator has seen before changes what it costs to get memory from it.
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            row = pool.submit(measure, model, part, options.batch_size, options.blocks).result()
        row["median_s"] = {backend: statistics.median(row["times"][backend]) for backend in BACKENDS}
        row["ratio"] = row["median_s"]["reference"] / row["median_s"]["auto"]
        rows.append(row)
    return path, {
        "benchmark": "tokens_to_token",
        "date": date.isoformat(timespec="seconds"),
        "command": command_line("tokens_to_token", argv),
        "device": "cpu",
        "hardware": hardware,
        "dtype": "float32",
        "batch_size": options.batch_size,
        "img_size": 224,
        "tolerance": TOLERANCE,
        "rows": rows,
        "environment": env,
    }


if __name__ == "__main__":
    sys.exit(main())
