"""Measure images per second of T2T-ViT in each variant, beside timm's models. See benchmarks/README.md."""

from __future__ import annotations

import argparse
import functools
import itertools
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

import t2t_fast
from t2t_fast import use_backend
from t2t_fast.bench import measuring, models, rates
from t2t_fast.bench.common import (
    OUTPUT_HELP,
    command_line,
    new_result,
    positive_int,
    positive_seconds,
    read_json,
    result_path,
    write_json,
)
from t2t_fast.bench.images import load_images
from t2t_fast.bench.loader import Loader
from t2t_fast.bench.plots import plot_macs
from t2t_fast.bench.show import show
from t2t_fast.bench.terminal import BarColumn, Console, Progress, TextColumn, TimeRemainingColumn
from t2t_fast.bench.variants import EXPORTED, INT8, PRECISIONS, Programs, Row, product_dtype
from t2t_fast.config import BACKENDS
from t2t_fast.env import collect_env
from t2t_fast.usage import OneLineParser, UsageError

MODELS = ("t2t_vit_14", "deit_small_patch16_224", "vit_small_patch16_224", "resnet50")
VARIANTS = (*BACKENDS, "frozen", "compiled", "compiled-reference", "compiled-frozen", "cuda-graph", *EXPORTED)
GRID: dict[str, Any] = {
    "models": ["t2t_vit_7", "t2t_vit_14", "t2t_vit_t_14"],
    "mode": ["inference", "training"],
    "img_size": [32, 64, 128, 224, 384],
    "batch_size": [1, 2, 16],
}
DEFAULT_VARIANTS = {"inference": ("reference", "auto", "frozen"), "training": ("reference", "auto")}
BATCH_SIZES = {"cpu": 16, "cuda": 128}
LATENCY_REPEATS = 100
MAX_IMG_SIZE = 4096
MAX_BEST = 1024  # the largest batch in the search for the best one
SEED = 0
Keep = Callable[[Path, dict[str, Any]], None]

EXAMPLES = """\
examples:
  {run}                              the default comparison, two minutes on a CPU
  {run} --models paper --batch-size best           all models of the paper's tables
  {run} --mode training --precision autocast-bfloat16 --variants reference auto compiled
  {run} --device cuda --precision bfloat16 float16 --batch-size 32 128 512
  {run} --models t2t_vit_14 --latency --variants auto frozen cuda-graph
  {run} --models zoo --variants reference frozen onnx openvino    exported programs
  {run} --grid                       small to large images and batches, the slowest cell first
  {run} --images ~/imagenet/val --with-loader      decoding included
  {run} --models paper --output run.json           after an interruption: --resume run.json

exit status: 0, 1 if a variant's results are wrong, 2 if an argument is, 130 if interrupted
"""


def batch_size(text: str) -> int | str:
    """An argparse type: a number of images, ``max`` or ``best``."""
    return text if text in ("max", "best") else positive_int(text)


def parse_arguments(argv: Sequence[str], prog: str = "throughput.py") -> argparse.Namespace:
    """Parse the arguments of ``prog``, the script or the command."""
    examples = EXAMPLES.format(run=f"python benchmarks/{prog}" if prog.endswith(".py") else prog)
    parser = OneLineParser(prog=prog, description=__doc__, epilog=examples)
    add = parser.add_argument
    add("--models", nargs="+", default=list(MODELS), metavar="NAME", help=f"or paper, zoo; default: {' '.join(MODELS)}")
    add(
        "--variants",
        "--backends",
        nargs="+",
        choices=VARIANTS,
        metavar="NAME",
        help=f"of the T2T-ViTs: {', '.join(VARIANTS)}; default: reference auto, and frozen in inference. With "
        "compiled, timm's models are measured compiled, too",
    )
    add("--mode", nargs="+", default=["inference"], choices=("inference", "training"), help="default: inference")
    add(
        "--precision",
        "--dtype",
        nargs="+",
        default=["auto"],
        choices=("auto", *PRECISIONS),
        metavar="NAME",
        help=f"{', '.join(PRECISIONS)}; default: auto, bfloat16 (else float16) on CUDA, float32 elsewhere",
    )
    add(
        "--batch-size",
        nargs="+",
        type=batch_size,
        metavar="N",
        help="max: the largest that fits into a GPU; best: the one with most images/s; default: 16 on a CPU, 128 on "
        "CUDA, 32 elsewhere",
    )
    add("--latency", action="store_true", help=f"batches of 1, {LATENCY_REPEATS} rounds, percentiles")
    add(
        "--grid",
        action="store_true",
        help=f"other defaults: {', '.join(GRID['models'])}; {', '.join(map(str, GRID['img_size']))} px; batches of "
        f"{', '.join(map(str, GRID['batch_size']))}; both modes",
    )
    add("--img-size", nargs="+", type=positive_int, default=[224], metavar="PIXELS", help="default: 224")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps", "xpu"), help="auto: a GPU if there is one")
    add("--repeats", type=positive_int, metavar="N", help="rounds; default: what the time budget allows, 5 to 100")
    add(
        "--time-budget",
        type=positive_seconds,
        default=45.0,
        metavar="SECONDS",
        help="for the rounds of all rows together; default: 45",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--images", type=Path, metavar="FOLDER", help="crop the images, or shards, in this folder")
    source.add_argument("--synthetic", action="store_true", help="noise instead of photographs")
    add("--with-loader", action="store_true", help="include reading, decoding and cropping --images in the time")
    add("--output", type=Path, metavar="JSON", help=OUTPUT_HELP)
    add("--resume", type=Path, metavar="JSON", help="measure the rows that this file lacks, with its arguments")
    add("--no-plot", action="store_true", help="no plot beside the result file")
    options = parser.parse_args(argv)
    if options.grid and options.latency:
        parser.error("--grid: goes with any argument but --latency, which measures batches of 1")
    if options.grid:
        parser.set_defaults(**GRID)
        options = parser.parse_args(argv)
    if options.resume and len(argv) > (1 if argv[0].startswith("--resume=") else 2):
        parser.error("--resume: goes on with the arguments in the file; leave all others out")
    if max(options.img_size) > MAX_IMG_SIZE:
        parser.error(f"--img-size: got {max(options.img_size)}; accepted: up to {MAX_IMG_SIZE}")
    if options.latency and options.batch_size:
        parser.error("--latency: measures batches of 1; leave --batch-size out")
    if options.with_loader and options.images is None:
        parser.error("--with-loader: needs --images FOLDER")
    return options


def main(argv: Sequence[str] | None = None, prog: str = "throughput.py") -> int:
    """Run the benchmark as ``prog`` and return the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parse_arguments(argv, prog)
    path: Path | None = None

    def keep(target: Path, result: dict[str, Any]) -> None:
        nonlocal path
        path = target
        write_json(target, result)

    try:
        result = measure(options, argv, keep)
        show(result)
        assert path is not None
        plain = result["grid"] or "--no-plot" in shlex.split(result["command"])  # a resumed run's, too
        pictures = [] if plain else plot_macs(result["rows"], result["hardware"], path)
    except UsageError as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "nothing was written" if path is None else f"go on with --resume {shlex.quote(str(path))}"
        print(f"{prog}: interrupted, {kept}", file=sys.stderr)
        return 130
    print(f"results: {path}")
    if pictures:
        print(f"plot: {' '.join(map(str, pictures))}")
    return 0 if result["passed"] else 1


def measure(options: argparse.Namespace, argv: list[str], keep: Keep) -> dict[str, Any]:
    """Measure all rows; ``keep`` is called with the result so far, again and again.

    Raises:
        UsageError: An argument is impossible here.
    """
    before = None if options.resume is None else read_json("--resume", options.resume)
    if before is not None:
        _check_whole(options.resume, before)
        argv = shlex.split(before["command"])[2:]
        resumed, options = options, parse_arguments(argv)
        options.output, options.resume = resumed.resume, resumed.resume
    with _progress() as progress, use_backend("auto"):  # T2T_FAST_BACKEND is ignored
        task = progress.add_task("starting", total=None)

        def report(what: str, done: int, planned: int) -> None:
            progress.update(task, description=what, completed=done, total=planned)

        return _Run(options, argv, before, keep, report).measure()


class _Kind(NamedTuple):
    """The conditions that rows of a comparison share; ``size`` is a batch size, "max" or "best"."""

    mode: str
    precision: str
    img_size: int
    size: int | str

    def asked(self, row: Row) -> tuple[Any, ...]:
        """Identifies the row in the file, with the batch size as given by the arguments."""
        return (*row.key[:4], str(self.size), self.img_size)


class _Run:
    """One run of the benchmark.

    Args:
        options: The arguments.
        argv: The command line that they were parsed from.
        before: The result of an interrupted run, whose rows are kept.
        keep: Called with the result so far, again and again.
        report: Called with the current activity, the steps done and the steps planned.

    Attributes:
        result: The result so far.

    Raises:
        UsageError: An argument is impossible here.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        argv: list[str],
        before: dict[str, Any] | None,
        keep: Keep,
        report: measuring.Report,
    ) -> None:
        self.started, date = time.perf_counter(), datetime.now().astimezone()
        self.options, self.keep, self.report = options, keep, report
        self.device = measuring.select_device(options.device)
        self.models = models.resolve_names(options.models)
        usual = BATCH_SIZES.get(self.device.type, 32)
        sizes = [1] if options.latency else options.batch_size or [usual]
        if "max" in sizes and self.device.type != "cuda":
            raise UsageError(
                f"--batch-size: max is for CUDA devices, {self.device.type!r} has no limit of its own; try best"
            )
        precisions = [measuring.select_precision(name, self.device) for name in options.precision]
        kinds = itertools.product(options.mode, precisions, dict.fromkeys(options.img_size), sizes)
        self.kinds = [_Kind(*kind) for kind in kinds]
        self.num_images = min(max((size for size in sizes if isinstance(size, int)), default=usual), 256)
        if INT8 in (options.variants or ()):
            self.num_images = max(self.num_images, t2t_fast.Int8.LEAST)
        env = collect_env()
        hardware = measuring.device_name(self.device, env)
        self.path = result_path(options.output, hardware, env, date)
        self.result = new_result(
            "throughput",
            date,
            command_line("throughput", argv),
            env,
            device=self.device.type,
            hardware=hardware,
            seed=SEED,
            time_budget=options.time_budget,
            with_loader=options.with_loader,
            grid=options.grid,
            complete=False,
            passed=True,
            operations_per_second={},
            total_seconds=0.0,
        )
        if before is not None:
            _check_same(before, self.result)
            kept = ("rows", "date", "command", "operations_per_second")
            self.result |= {name: before[name] for name in kept if name in before}
            self.result["rows"] = [row for row in self.result["rows"] if row["status"] != "pending"]
            self.started -= before["total_seconds"]
        self.programs = Programs()
        self.done = {tuple(row["asked"]) for row in self.result["rows"]}

    def measure(self) -> dict[str, Any]:
        """Measure all rows that ``before`` lacks, and return the result."""
        for number, kind in enumerate(self.kinds):
            self._measure_kind(number, kind)
        self.result["complete"] = True
        self._save()
        return self.result

    def _measure_kind(self, number: int, kind: _Kind) -> None:
        options = self.options
        images, self.result["images"] = load_images(
            options.images, options.synthetic, self.num_images, kind.img_size, SEED
        )
        oracle = measuring.Oracle(images, self.device, SEED, self.programs)
        rows = make_rows(self.models, options, kind.mode, kind.precision, kind.img_size)
        rows = [row for row in rows if kind.asked(row) not in self.done]
        torch.set_float32_matmul_precision("high" if kind.precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = kind.precision == "tf32"  # the switch of convolutions
        self._measure_product(kind.precision)
        for row in rows:
            self._set_batch(row, number, kind, oracle)
        loader = Loader(options.images, kind.img_size, self.device) if options.with_loader else None
        seconds_of = _clock(oracle, loader, measuring.shares_processor(rows) and self.device.type == "cpu")
        # Two batches of maximal size do not fit at once.
        groups = [[row] for row in rows] if kind.size == "max" else [rows]
        repeats = options.repeats or (LATENCY_REPEATS if options.latency else None)
        budget = options.time_budget / len(self.kinds) / max(1, len(groups))
        for group in groups:
            keep_group = functools.partial(self._save, group, kind)
            waiting = [row for row in group if row.status == "pending"]
            ready = measuring.prepare(waiting, oracle, self.report, keep_group)
            measuring.time_rows(ready, seconds_of, repeats, budget, self.report, keep_group)
            for row in group:
                row.drop()
            self.result["rows"] += [measuring.figures(row) | {"asked": kind.asked(row)} for row in group]
            self._save()
        self._measure_product(kind.precision)

    def _set_batch(self, row: Row, number: int, kind: _Kind, oracle: measuring.Oracle) -> None:
        """Set the row's batch size; search for it if the argument is max or best."""
        if isinstance(kind.size, int):
            row.batch_size = kind.size
            return
        self.report(f"{kind.size} batch of {row.label}", number, len(self.kinds))
        is_max = kind.size == "max"
        found = measuring.largest_batch(row, oracle) if is_max else measuring.best_batch(row, oracle, MAX_BEST)
        row.batch_size = max(found, 1)
        if found == 0 and row.status == "pending":
            row.status = "out of memory"

    def _measure_product(self, precision: str) -> None:
        """Keep the best rate of a matmul before and after the rows, as others may slow the machine down at times."""
        self.report("a large matmul", 0, 1)
        found = rates.operations_per_second(product_dtype(precision), self.device)
        best = self.result["operations_per_second"]
        best[precision] = max(found, best.get(precision, 0.0))

    def _save(self, rows: Sequence[Row] = (), kind: _Kind | None = None) -> None:
        """Call ``keep`` with the result so far, including ``rows`` of that kind that are being timed."""
        timed = [measuring.figures(row) | {"asked": kind.asked(row)} for row in rows if kind is not None]
        now = [*self.result["rows"], *timed]
        measuring.relate(now, self.result["operations_per_second"])
        self.result["passed"] = all(row["passed"] for row in now)
        self.result["total_seconds"] = round(time.perf_counter() - self.started, 1)
        self.keep(self.path, self.result | {"rows": now})


def _clock(oracle: measuring.Oracle, loader: Loader | None, rests: bool) -> Callable[[Row], float]:
    """A function that returns the seconds of one step of a row, on ready images or on those of the loader."""
    time_one = measuring.time_after_rest if rests else measuring.time_step

    def seconds_of(row: Row) -> float:
        if loader is not None:
            return measuring.time_stream(row, lambda row: loader.next(row.batch_size, row.weight_dtype), loader.ahead)
        if row.images is None:
            row.images = measuring.batch_for(row, oracle)
        return time_one(row, row.images)

    return seconds_of


def make_rows(names: Sequence[str], options: argparse.Namespace, mode: str, precision: str, img_size: int) -> list[Row]:
    """A row for every model and variant; batch sizes are still to be set."""
    variants = list(dict.fromkeys(options.variants or DEFAULT_VARIANTS[mode]))
    compiled: list[str | None] = ["compiled"] if "compiled" in variants else []
    rows = []
    for name in names:
        cost = models.count(name, img_size)
        for variant in variants if models.is_ours(name) else [None, *compiled]:
            rows.append(Row(name, variant, mode, precision, 1, img_size, cost.params, cost.macs))
    return rows


def _check_whole(path: Path, before: dict[str, Any]) -> None:
    """Raise UsageError unless the file was written by this script."""
    needed = ("command", "date", "total_seconds", "environment", "hardware")
    if before.get("benchmark") != "throughput" or not all(name in before for name in needed):
        raise UsageError(f"--resume: {str(path)!r} is no file of throughput.py; pass one that it has written")
    if not all(isinstance(row, dict) and {"asked", "status", "seconds"} <= row.keys() for row in before["rows"]):
        raise UsageError(f"--resume: {str(path)!r} is of another version of throughput.py; start anew")


def _check_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UsageError unless both were measured on the same machine with the same software."""
    for name, a, b in (
        ("hardware", before.get("hardware"), now["hardware"]),
        ("torch", before["environment"]["torch"], now["environment"]["torch"]),
        ("commit", before["environment"].get("git"), now["environment"].get("git")),
    ):
        if a != b:
            raise UsageError(f"--resume: the file's {name} is {a!r}, here it is {b!r}; start anew")


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("left")
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


if __name__ == "__main__":
    sys.exit(main())
