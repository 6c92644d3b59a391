"""Measure the Python time of one block: with few, narrow tokens, whose arithmetic takes almost no time.

    python benchmarks/overhead.py                        # timm's block, ours, and ours frozen, on one thread
    python benchmarks/overhead.py --precision bfloat16 --tokens 50

All blocks have the same width, heads and MLP. They run in turn, in many short runs. A figure is the median run, in
processor time of one thread, so that a busy machine matters little. Calls are counted by Python's profiler in one
forward pass: Python functions, and C functions called from Python.
"""

from __future__ import annotations

import argparse
import cProfile
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

import t2t_fast
from t2t_fast.bench import measuring
from t2t_fast.bench.common import (
    OUTPUT_HELP,
    command_line,
    new_result,
    positive_int,
    result_path,
    write_json,
)
from t2t_fast.bench.terminal import Console, Table
from t2t_fast.env import collect_env
from t2t_fast.usage import OneLineParser, UsageError

HEAD_DIM, MLP_RATIO, CALLS_PER_RUN = 8, 3.0, 20
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_blocks(heads: int, dtype: torch.dtype) -> dict[tuple[str, str], nn.Module]:
    """(mode, name) to block: timm's, ours, and ours frozen."""
    width = heads * HEAD_DIM
    sizes: dict[str, Any] = {"embed_dim": width, "num_heads": heads, "mlp_ratio": MLP_RATIO, "depth": 1, "img_size": 32}
    model = t2t_fast.T2TViT(tokens_type="convolution", num_classes=2, **sizes).to(dtype)
    timm = TimmBlock(width, heads, mlp_ratio=MLP_RATIO).to(dtype)
    trained = t2t_fast.T2TViT(tokens_type="convolution", num_classes=2, **sizes).to(dtype).train()
    return {
        ("inference", "timm"): timm.eval(),
        ("inference", "auto"): model.eval().blocks[0],
        ("inference", "frozen"): t2t_fast.freeze(model).model.blocks[0],
        ("training", "timm"): TimmBlock(width, heads, mlp_ratio=MLP_RATIO).to(dtype).train(),
        ("training", "auto"): trained.blocks[0],
    }


def step_of(mode: str, block: nn.Module, tokens: Tensor) -> Callable[[], Any]:
    """One call: forward in inference, forward and backward in training."""
    if mode == "training":
        return lambda: block(tokens).sum().backward()

    def infer() -> Tensor:
        with torch.no_grad():
            return block(tokens)

    return infer


def count_calls(mode: str, block: nn.Module, tokens: Tensor) -> int:
    """Function calls of one forward pass."""
    profile = cProfile.Profile()
    with torch.set_grad_enabled(mode == "training"):
        block(tokens)
        profile.enable()
        block(tokens)
        profile.disable()
    return sum(entry.callcount for entry in profile.getstats()) - 1  # the profiler's own disable()


def time_in_turn(steps: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Seconds per call of each step, the median of ``rounds`` short runs; the order is reversed after every run."""
    runs: list[list[float]] = [[] for _ in steps]
    for step in steps:
        for _ in range(CALLS_PER_RUN):
            step()
    for turn in range(rounds):
        for index in (range(len(steps)), reversed(range(len(steps))))[turn % 2]:
            start = time.thread_time()
            for _ in range(CALLS_PER_RUN):
                steps[index]()
            runs[index].append((time.thread_time() - start) / CALLS_PER_RUN)
    return [statistics.median(run) for run in runs]


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per mode and block: microseconds, their ratio to timm's, and calls."""
    torch.manual_seed(0)
    dtype = PRECISIONS[options.precision]
    blocks = make_blocks(options.heads, dtype)
    tokens = torch.randn(1, options.tokens, options.heads * HEAD_DIM, dtype=dtype)
    seconds = time_in_turn([step_of(mode, block, tokens) for (mode, _), block in blocks.items()], options.rounds)
    rows: list[dict[str, Any]] = []
    for ((mode, name), block), duration in zip(blocks.items(), seconds, strict=True):
        calls = count_calls(mode, block, tokens)
        row: dict[str, Any] = {"mode": mode, "block": name, "microseconds": round(1e6 * duration, 2), "calls": calls}
        timm = next((known for known in rows if known["mode"] == mode and known["block"] == "timm"), row)
        row["times_timm"] = round(row["microseconds"] / timm["microseconds"], 3)
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status: 0, or 2 if an argument is impossible."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = OneLineParser(prog="overhead.py", description=__doc__)
    add = parser.add_argument
    add("--tokens", type=positive_int, default=5, metavar="N", help="tokens of the one image; default: 5")
    add("--heads", type=positive_int, default=6, metavar="N", help=f"heads of {HEAD_DIM} channels; default: 6")
    add("--precision", default="float32", choices=PRECISIONS, help="default: float32")
    add("--rounds", type=positive_int, default=100, metavar="N", help=f"runs of {CALLS_PER_RUN} calls; default: 100")
    add("--output", type=Path, metavar="JSON", help=OUTPUT_HELP)
    options = parser.parse_args(argv)
    env, date, threads = collect_env(), datetime.now().astimezone(), torch.get_num_threads()
    hardware = measuring.device_name(torch.device("cpu"), env)
    torch.set_num_threads(1)
    try:
        path = result_path(options.output, f"overhead {hardware}", env, date)
        command = command_line("overhead", argv)
        sizes = {"precision": options.precision, "tokens": options.tokens, "channels": options.heads * HEAD_DIM}
        result = new_result("overhead", date, command, env, device="cpu", hardware=hardware, **sizes)
        result["rows"] = measure(options)
        write_json(path, result)
    except UsageError as error:
        parser.error(str(error))
    finally:
        torch.set_num_threads(threads)
    table = Table("mode", "block", "us", "of timm's", "calls")
    for row in result["rows"]:
        table.add_row(
            row["mode"], row["block"], f"{row['microseconds']:.1f}", f"{row['times_timm']:.2f}", str(row["calls"])
        )
    Console(highlight=False).print(table)
    print(f"results: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
