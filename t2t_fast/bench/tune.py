"""Try other block sizes, warps and stages for the Triton kernels, and print lines for kernels/configs.py.

    python benchmarks/tune.py --output benchmarks/results                         # all tables, bfloat16
    python benchmarks/tune.py --tables SOFT_SPLIT_LINEAR_FORWARD --kinds tf32 --time-budget 60

For every table the candidates are the shipped configuration and its neighbours (a block doubled or halved, other warps,
other stages). Each candidate is compiled and compared with `aten`, results and gradients, in a process of its own. The
correct ones are timed one by one in the ops that use the table, at full size. A candidate that crashes, hangs or does
not fit is dropped. The score is the geometric mean over the ops of the time relative to the shipped configuration. The
best are timed again, alternating with the shipped one; a candidate that is 2% faster both times is proposed, else the
shipped one is marked as tuned on this chip. Tables tuned on this chip already are skipped. Needs a GPU; `--tiny` tries
the procedure in Triton's interpreter, where times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from t2t_fast.bench.common import (
    OUTPUT_HELP,
    command_line,
    new_result,
    positive_int,
    positive_seconds,
    result_path,
    write_json,
)
from t2t_fast.bench.rates import median_seconds
from t2t_fast.env import collect_env
from t2t_fast.usage import OneLineParser, UsageError

# Table to the ops that use it, and whether forward or training is timed.
USES = {
    "SOFT_SPLIT_LINEAR_FORWARD": (("soft_split_linear",), "forward"),
    "TOKEN_PERFORMER": (("soft_split_performer",), "forward"),
    "TOKEN_PERFORMER_BACKWARD": (("soft_split_performer",), "training"),
    "SOFT_SPLIT_LINEAR_BACKWARD_WEIGHT": (("soft_split_linear",), "training"),
    "SOFT_SPLIT_LINEAR_BACKWARD_INPUT": (("soft_split_linear",), "training"),
    "PERFORMER_ATTENTION": (("performer_attention",), "forward"),
    "PERFORMER_ATTENTION_BACKWARD": (("performer_attention",), "training"),
    "PERFORMER_ATTENTION_BACKWARD_KEY": (("performer_attention",), "training"),
    "ADD_LAYER_NORM": (("add_layer_norm",), "forward"),
    "ADD_LAYER_NORM_BACKWARD": (("add_layer_norm",), "training"),
}
KINDS = {"half": "bfloat16", "tf32": "float32"}
BETTER = 0.98
SECONDS = 120  # for a candidate in a process of its own


def neighbours(config: Any) -> list[Any]:
    """``config``, and every configuration that differs from it by one step."""
    from t2t_fast.kernels.windows import WHOLE

    found, largest = [config], {"BLOCK_FEATURES": WHOLE.value}
    for name, size in config.blocks.items():
        if name == "BLOCK_REST":  # as it is, or none
            if size:
                found.append(dataclasses.replace(config, blocks={**config.blocks, name: 0}))
            continue
        # The rest fits no other number of outputs.
        alone = {"BLOCK_REST": 0} if name == "BLOCK_OUT" and "BLOCK_REST" in config.blocks else {}
        for other in (size // 2, 2 * size):
            fits = 16 <= other <= largest.get(name, 256)
            if fits or (name == "BLOCK_TOKENS" and 1 <= other < 16 and size < 16):
                found.append(dataclasses.replace(config, blocks={**config.blocks, name: other, **alone}))
    found += [dataclasses.replace(config, num_warps=warps) for warps in (4, 8) if warps != config.num_warps]
    found += [
        dataclasses.replace(config, num_stages=stages)
        for stages in (1, 2, 3, 4)
        if stages != config.num_stages and abs(stages - config.num_stages) <= 1
    ]
    return [dataclasses.replace(config, tuned=None) for config in found]


@contextlib.contextmanager
def table_replaced(table: str, config: Any) -> Iterator[None]:
    """A context in which the kernels of ``table`` always take ``config``."""
    from t2t_fast.kernels import configs

    kinds = ("half", "tf32", "float32", "float64")
    with mock.patch.object(configs, table, configs.Table({0: dict.fromkeys(kinds, config)})):
        yield


def cases_of(table: str) -> list[Any]:
    from t2t_fast.bench.cases import CASES

    return [case for case in CASES if case.op in USES[table][0]]


def check(table: str, config: Any, kind: str, device_name: str, batch: int) -> str | None:
    """Compile, and compare with ``aten``; None if correct, else the fault."""
    from t2t_fast.bench.cases import TOLERANCES, runners, sample_of, step

    device, dtype = torch.device(device_name), getattr(torch, KINDS[kind])
    torch.set_float32_matmul_precision("high")
    for case in cases_of(table):
        sample = sample_of(case, batch, dtype, device)
        functions = runners(case)
        want = step(functions["aten"], sample)
        with table_replaced(table, config):
            with torch.no_grad():
                first = functions["triton"](sample)
            got = step(functions["triton"], sample)
        results = first if isinstance(first, tuple) else (first,)
        for g, w in [*zip(results, want, strict=False), *zip(got, want, strict=True)]:
            error = ((g.double() - w.double()).norm() / w.double().norm()).item()
            if not error <= 4 * TOLERANCES[dtype]:  # both are rounded
                return f"{case.name}: differs by {error:.1e}"
    return None


def apart(function: Callable[..., Any], *arguments: Any, seconds: float = SECONDS) -> Any:
    """Run the function in a process of its own; its result, or a text that says why there is none."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["t2t_fast.bench.tune"])  # it imports torch once and does not use the GPU
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()  # so that the pipe ends with the process
    try:
        return receiver.recv() if receiver.poll(seconds) else f"no answer within {seconds:g} s"
    except EOFError:
        process.join()
        return f"the process died, exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
        receiver.close()


def _answer(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        answer = function(*arguments)
    except Exception as error:  # compilers, drivers and kernels raise anything; the candidate is dropped
        answer = reason(error)
    sender.send(answer)


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def time_candidate(table: str, config: Any, kind: str, device_name: str, batch: int) -> list[float]:
    """Seconds of each use."""
    from t2t_fast.bench.cases import runners, sample_of, step

    device, dtype, part = torch.device(device_name), getattr(torch, KINDS[kind]), USES[table][1]
    torch.set_float32_matmul_precision("high")
    seconds = []
    for case in cases_of(table):
        sample, function = sample_of(case, batch, dtype, device), runners(case)["triton"]
        with table_replaced(table, config):
            if part == "training":
                seconds.append(median_seconds(lambda f=function, t=sample: step(f, t), device))  # type: ignore[misc]
                continue
            with torch.no_grad():
                seconds.append(median_seconds(lambda f=function, t=sample: f(t), device))  # type: ignore[misc]
    return seconds


def times_of(table: str, config: Any, kind: str, device_name: str, batch: int) -> list[float] | str:
    """:func:`time_candidate`, or why it failed."""
    arguments = (table, config, kind, device_name, batch)
    if not _usable(device_name):
        return apart(time_candidate, *arguments)
    try:
        return time_candidate(*arguments)
    except Exception as error:  # out of memory, a launch that fails
        failure = reason(error)
    if _usable(device_name) and device_name == "cuda":
        torch.cuda.empty_cache()
    return failure


def _usable(device_name: str) -> bool:
    """Whether this process can still use the device; after some errors it cannot."""
    try:
        if device_name == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def snippet(table: str, arch: int, kind: str, config: Any, chip: str) -> str:
    """The line for kernels/configs.py."""
    blocks = ", ".join(f"{name.removeprefix('BLOCK_').lower()}={size}" for name, size in config.blocks.items())
    call = f'_config({config.num_warps}, {config.num_stages}, {blocks}, resident={config.resident}, tuned="{chip}")'
    return f'{table}: {arch}: {{"{kind}": {call}}}'


def main(argv: Sequence[str] | None = None) -> int:
    """Tune and return the exit status: 0, or 2 if an argument is impossible."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = OneLineParser(prog="tune.py", description=__doc__)
    add = parser.add_argument
    add("--tables", nargs="+", default=list(USES), choices=USES, metavar="TABLE", help="default: all")
    add("--kinds", nargs="+", default=["half"], choices=KINDS, help="of arithmetic; default: half, as bfloat16")
    add("--batch-size", type=positive_int, default=128, metavar="N", help="images to time with; default: 128")
    add("--time-budget", type=positive_seconds, metavar="SECONDS", help="start no further table after so long")
    add("--again", action="store_true", help="also the tables that were tuned on this chip")
    add("--tiny", action="store_true", help="two candidates of one table in the interpreter")
    add("--output", type=Path, metavar="JSON", help=OUTPUT_HELP)
    options = parser.parse_args(argv)
    if options.tiny:
        os.environ["TRITON_INTERPRET"] = "1"
        options.tables, options.kinds, options.batch_size = ["ADD_LAYER_NORM"], ["tf32"], 1
    try:
        path, result = _tune_all(options, argv)
    except UsageError as error:
        parser.error(str(error))
    for row in result["rows"]:
        best = row["status"] if row["best"] is None else f"best {row['best']:.3f}"
        print(f"{row['table']}, {row['kind']}: {row['tried']} tried, {len(row['failed'])} failed, {best}")
    for name in result["skipped"]:
        print(f"{name}: tuned on this chip already; --again tunes it again")
    print("\n".join(result["snippets"]) or "nothing to put into kernels/configs.py")
    print(f"results: {path}")
    return 0


def _tune_all(options: argparse.Namespace, argv: list[str]) -> tuple[Path, dict[str, Any]]:
    from t2t_fast.kernels import configs
    from t2t_fast.kernels.launch import chip_of

    if not options.tiny and not torch.cuda.is_available():
        raise UsageError("there is no CUDA device to tune on; --tiny tries the machinery without")
    device = torch.device("cpu" if options.tiny else "cuda:0")
    chip = "the interpreter" if options.tiny else torch.cuda.get_device_name()
    arch, env, date = chip_of(device).arch, collect_env(), datetime.now().astimezone()
    path = result_path(options.output, f"tuning {chip}", env, date)
    torch.set_float32_matmul_precision("high")
    command = command_line("tune", argv, ("--output", "--time-budget"))
    lists: dict[str, list[str]] = {"skipped": [], "snippets": []}
    result = new_result("tuning", date, command, env, device=device.type, hardware=chip, **lists)
    write_json(path, result)
    started = time.perf_counter()
    for table, kind in ((table, kind) for kind in options.kinds for table in options.tables):
        if options.time_budget and time.perf_counter() - started > options.time_budget:
            break
        dtype = getattr(torch, KINDS[kind])
        if not configs.has_config(getattr(configs, table), device, dtype):
            continue
        shipped = configs.pick(getattr(configs, table), device, dtype)
        if shipped.tuned == chip and not options.again:
            result["skipped"].append(f"{table}, {kind}")
            continue
        candidates = neighbours(shipped)[: 2 if options.tiny else None]
        batches, where = (min(2, options.batch_size), options.batch_size), (table, kind, device.type)
        failed, times = _try_all(candidates, where, *batches)
        winner, ratio = confirm(candidates, where, failed, times, options.batch_size)
        result["rows"].append(_row(table, kind, candidates, failed, times, winner, ratio))
        if 0 in times:
            result["snippets"].append(snippet(table, arch, kind, candidates[winner], chip))
        write_json(path, result)
    write_json(path, result)
    return path, result


def _try_all(
    candidates: list[Any], where: tuple[str, str, str], small: int, full: int
) -> tuple[dict[int, str], dict[int, list[float]]]:
    """Check all candidates and time the correct ones: faults and seconds, each by index."""
    table, kind, device_name = where
    with ThreadPoolExecutor(min(12, os.cpu_count() or 1)) as pool:  # a thread waits for a process
        found = list(pool.map(lambda config: apart(check, table, config, kind, device_name, small), candidates))
    failed = {index: wrong for index, wrong in enumerate(found) if wrong}
    times: dict[int, list[float]] = {}
    for index in (index for index in range(len(candidates)) if index not in failed):
        seconds = times_of(table, candidates[index], kind, device_name, full)
        if isinstance(seconds, str):
            failed[index] = seconds
        else:
            times[index] = seconds
    return failed, times


def confirm(
    candidates: list[Any],
    where: tuple[str, str, str],
    failed: dict[int, str],
    times: dict[int, list[float]],
    batch: int,
) -> tuple[int, float]:
    """Index of the winner and its time over the shipped one's; 0 and 1 if no candidate is faster again.

    The fastest of many is partly luck, so the best three are timed three more times, alternating with the shipped one.
    A candidate that fails meanwhile moves from ``times`` to ``failed``.
    """
    scores = scores_of(times)
    for index in sorted(scores, key=lambda index: scores[index])[:3]:
        ratios: list[float] = []
        for turn in range(3 if scores[index] < BETTER else 0):
            again: dict[int, list[float]] = {}
            for i in (index, 0) if turn % 2 else (0, index):
                seconds = times_of(where[0], candidates[i], *where[1:], batch)
                if isinstance(seconds, str):
                    failed[i] = seconds
                    del times[i]
                    break
                again[i] = seconds
            if len(again) < 2:
                break
            ratios.append(geometric_mean(again[index], again[0]))
        if 0 not in times:
            break
        if len(ratios) == 3 and statistics.median(ratios) < BETTER:
            return index, statistics.median(ratios)
    return 0, 1.0


def scores_of(times: dict[int, list[float]]) -> dict[int, float]:
    """Scores by index: times over those of the shipped configuration, which is the first; empty if that has none."""
    return {i: geometric_mean(seconds, times[0]) for i, seconds in times.items()} if 0 in times else {}


def geometric_mean(seconds: list[float], others: list[float]) -> float:
    """Geometric mean of the ratios of two lists of times."""
    return math.exp(statistics.fmean(math.log(a / b) for a, b in zip(seconds, others, strict=True)))


def _row(
    table: str,
    kind: str,
    candidates: list[Any],
    failed: dict[int, str],
    times: dict[int, list[float]],
    winner: int,
    ratio: float,
) -> dict[str, Any]:
    """A row of the result file; if the shipped configuration has no time, there is no best."""
    scores = scores_of(times)
    return {
        "table": table,
        "kind": kind,
        "tried": len(candidates),
        "failed": {str(candidates[i]): reason for i, reason in failed.items()},
        "status": "ok" if 0 in times else f"shipped configuration: {failed[0]}",
        "best": ratio if 0 in times else None,
        "best_index": winner,
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
