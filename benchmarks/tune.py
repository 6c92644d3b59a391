"""Try other block sizes, warps and stages for the Triton kernels, and print what to put into kernels/configs.py.

    python benchmarks/tune.py --output benchmarks/results                         # all tables, bfloat16
    python benchmarks/tune.py --tables SOFT_SPLIT_LINEAR_FORWARD --kinds tf32 --time-budget 60

For every table the candidates are the shipped configuration and its neighbours (a block doubled or halved, other warps,
other stages). Processes in parallel compile each and compare results and gradients with `aten`; the right ones are then
timed one by one in the ops that use the table, at full size. What counts is the geometric mean over those uses,
relative to the shipped configuration; a candidate must be 2% better to be proposed. Needs a GPU; `--tiny` tries the
machinery in Triton's interpreter, where times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest import mock

from _common import OneLineParser, UsageError, command_line, positive_int, positive_seconds, result_path, write_json

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an uninstalled checkout; an installed package comes first

# Table to the uses whose time it decides, and whether forward or training.
USES = {
    "SOFT_SPLIT_LINEAR_FORWARD": (("soft_split_linear", "layer_norm_linear", "linear"), "forward"),
    "SOFT_SPLIT_PERFORMER": (("soft_split_performer",), "forward"),
    "TOKEN_PERFORMER": (("soft_split_performer",), "forward"),
    "TOKEN_PERFORMER_BACKWARD": (("soft_split_performer",), "training"),
    "SOFT_SPLIT_LINEAR_BACKWARD_WEIGHT": (("soft_split_linear", "layer_norm_linear"), "training"),
    "SOFT_SPLIT_LINEAR_BACKWARD_INPUT": (("soft_split_linear", "layer_norm_linear"), "training"),
    "PERFORMER_ATTENTION": (("performer_attention",), "forward"),
    "PERFORMER_ATTENTION_BACKWARD": (("performer_attention",), "training"),
    "ADD_LAYER_NORM": (("add_layer_norm",), "forward"),
    "ADD_LAYER_NORM_BACKWARD": (("add_layer_norm",), "training"),
}
KINDS = {"half": "bfloat16", "tf32": "float32"}
BETTER = 0.98


def neighbours(config: Any) -> list[Any]:
    """``config`` and what lies one step from it."""
    found = [config]
    for name, size in config.blocks.items():
        for other in (size // 2, 2 * size):
            if 16 <= other <= 256 or (name == "BLOCK_TOKENS" and 1 <= other < 16 and size < 16):
                found.append(dataclasses.replace(config, blocks={**config.blocks, name: other}))
    found += [dataclasses.replace(config, num_warps=warps) for warps in (4, 8) if warps != config.num_warps]
    found += [
        dataclasses.replace(config, num_stages=stages)
        for stages in (1, 2, 3, 4)
        if stages != config.num_stages and abs(stages - config.num_stages) <= 1
    ]
    return [dataclasses.replace(config, tuned=None) for config in found]


@contextlib.contextmanager
def table_replaced(table: str, config: Any) -> Iterator[None]:
    """Within, the kernels of ``table`` take ``config`` for everything."""
    from t2t_fast.kernels import configs

    kinds = ("half", "tf32", "float32", "float64")
    with mock.patch.object(configs, table, configs.Table({0: dict.fromkeys(kinds, config)})):
        yield


def cases_of(table: str) -> list[Any]:
    from _cases import CASES

    return [case for case in CASES if case.op in USES[table][0]]


def check(table: str, config: Any, kind: str, device_name: str, batch: int) -> str | None:
    """Compile and compare with ``aten``; None if right, or what is wrong. Runs in a process of its own."""
    import torch
    from _cases import TOLERANCES, runners, step, tensors_of

    device, dtype = torch.device(device_name), getattr(torch, KINDS[kind])
    torch.set_float32_matmul_precision("high")
    try:
        for case in cases_of(table):
            tensors = tensors_of(case, batch, dtype, device)
            functions = runners(case)
            want = step(functions["aten"], tensors)
            with table_replaced(table, config):
                with torch.no_grad():
                    first = functions["triton"](tensors)
                got = step(functions["triton"], tensors)
            results = first if isinstance(first, tuple) else (first,)
            for g, w in [*zip(results, want, strict=False), *zip(got, want, strict=True)]:
                error = ((g.double() - w.double()).norm() / w.double().norm()).item()
                if not error <= 4 * TOLERANCES[dtype]:  # both are rounded
                    return f"{case.name}: differs by {error:.1e}"
    except Exception as error:  # whatever the compiler, the driver or the kernel says: the candidate is out
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def time_candidate(table: str, config: Any, kind: str, device_name: str, batch: int) -> list[float]:
    """Seconds of each use."""
    import torch
    from _cases import runners, step, tensors_of
    from _rates import median_seconds

    device, dtype, part = torch.device(device_name), getattr(torch, KINDS[kind]), USES[table][1]
    seconds = []
    for case in cases_of(table):
        tensors, function = tensors_of(case, batch, dtype, device), runners(case)["triton"]
        with table_replaced(table, config):
            if part == "training":
                seconds.append(median_seconds(lambda f=function, t=tensors: step(f, t), device))  # type: ignore[misc]
                continue
            with torch.no_grad():
                seconds.append(median_seconds(lambda f=function, t=tensors: f(t), device))  # type: ignore[misc]
    return seconds


def snippet(table: str, arch: int, kind: str, config: Any, chip: str) -> str:
    """The line for kernels/configs.py."""
    blocks = ", ".join(f"{name.removeprefix('BLOCK_').lower()}={size}" for name, size in config.blocks.items())
    call = f'_config({config.num_warps}, {config.num_stages}, {blocks}, tuned="{chip}")'
    return f'{table}: {arch}: {{"{kind}": {call}}}'


def main(argv: Sequence[str] | None = None) -> int:
    """Tune and return the exit status: 0, or 2 if an argument is impossible."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = OneLineParser(prog="tune.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tables", nargs="+", default=list(USES), choices=USES, metavar="TABLE", help="default: all")
    add("--kinds", nargs="+", default=["half"], choices=KINDS, help="of arithmetic; default: half, as bfloat16")
    add("--batch-size", type=positive_int, default=128, metavar="N", help="images to time with; default: 128")
    add("--time-budget", type=positive_seconds, metavar="SECONDS", help="start no further table after so long")
    add("--tiny", action="store_true", help="two candidates of one table in the interpreter")
    add("--output", type=Path, metavar="JSON", help="file, or a folder for it; default: benchmarks/results/local")
    options = parser.parse_args(argv)
    if options.tiny:
        os.environ["TRITON_INTERPRET"] = "1"
        options.tables, options.kinds, options.batch_size = ["ADD_LAYER_NORM"], ["tf32"], 1
    try:
        path, result = _tune_all(options, argv)
    except UsageError as error:
        parser.error(" ".join(str(error).split()))
    for row in result["rows"]:
        print(
            f"{row['table']}, {row['kind']}: {row['tried']} tried, {len(row['failed'])} failed, best {row['best']:.3f}"
        )
    print("\n".join(result["snippets"]) or "nothing better than what is shipped")
    print(f"results: {path}")
    return 0


def _tune_all(options: argparse.Namespace, argv: list[str]) -> tuple[Path, dict[str, Any]]:
    import torch

    from t2t_fast.env import collect_env
    from t2t_fast.kernels import configs
    from t2t_fast.kernels.launch import chip_of

    if not options.tiny and not torch.cuda.is_available():
        raise UsageError("there is no CUDA device to tune on; --tiny tries the machinery without")
    device = torch.device("cpu" if options.tiny else "cuda:0")
    chip = "the interpreter" if options.tiny else torch.cuda.get_device_name()
    arch, env, date = chip_of(device).arch, collect_env(), datetime.now().astimezone()
    path = result_path(options.output, f"tuning {chip}", env, date)
    torch.set_float32_matmul_precision("high")
    result: dict[str, Any] = {
        "benchmark": "tuning",
        "date": date.isoformat(timespec="seconds"),
        "command": command_line("tune", argv),
        "hardware": chip,
        "environment": env,
        "rows": [],
        "snippets": [],
    }
    started = time.perf_counter()
    with ProcessPoolExecutor(1 if options.tiny else 12, mp_context=multiprocessing.get_context("spawn")) as pool:
        for table, kind in ((table, kind) for kind in options.kinds for table in options.tables):
            if options.time_budget and time.perf_counter() - started > options.time_budget:
                break
            dtype = getattr(torch, KINDS[kind])
            if not configs.has_config(getattr(configs, table), device, dtype):
                continue
            candidates = neighbours(configs.pick(getattr(configs, table), device, dtype))
            candidates = candidates[:2] if options.tiny else candidates
            work = {
                pool.submit(check, table, config, kind, device.type, min(2, options.batch_size)): index
                for index, config in enumerate(candidates)
            }
            failed = {work[done]: reason for done in as_completed(work) if (reason := done.result())}
            times = {
                index: time_candidate(table, config, kind, device.type, options.batch_size)
                for index, config in enumerate(candidates)
                if index not in failed
            }
            result["rows"].append(_row(table, kind, candidates, failed, times))
            best = result["rows"][-1]["best_index"]
            if best and result["rows"][-1]["best"] < BETTER:
                result["snippets"].append(snippet(table, arch, kind, candidates[best], chip))
            write_json(path, result)
    return path, result


def _row(
    table: str, kind: str, candidates: list[Any], failed: dict[int, str], times: dict[int, list[float]]
) -> dict[str, Any]:
    scores = {}
    if 0 in times:
        ratios = {i: [a / b for a, b in zip(t, times[0], strict=True)] for i, t in times.items()}
        scores = {i: math.exp(sum(map(math.log, r)) / len(r)) for i, r in ratios.items()}
    best = min(scores, key=lambda index: scores[index], default=0)
    return {
        "table": table,
        "kind": kind,
        "tried": len(candidates),
        "failed": {str(candidates[i]): reason for i, reason in failed.items()},
        "best": scores.get(best, 1.0),
        "best_index": best,
        "candidates": [
            {
                "config": dataclasses.asdict(c) | {"blocks": dict(c.blocks)},
                "seconds": times.get(i),
                "score": scores.get(i),
            }
            for i, c in enumerate(candidates)
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
