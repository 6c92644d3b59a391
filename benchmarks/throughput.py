"""Images per second of T2T-ViT in each variant, beside timm's models, on the same images. See README.md here."""

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
from typing import Any

from _common import (
    OneLineParser,
    UsageError,
    command_line,
    positive_int,
    positive_seconds,
    read_json,
    result_path,
    write_json,
)
from _terminal import BarColumn, Console, Progress, TextColumn, TimeRemainingColumn

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an uninstalled checkout; an installed package comes first

MODELS = ("t2t_vit_14", "deit_small_patch16_224", "vit_small_patch16_224", "resnet50")
BACKENDS = ("auto", "reference", "aten", "triton", "native")
VARIANTS = (*BACKENDS, "frozen", "compiled", "compiled-reference", "compiled-frozen", "cuda-graph", "onnx", "aoti")
DEFAULT_VARIANTS = {"inference": ("reference", "auto", "frozen"), "training": ("reference", "auto")}
PRECISIONS = ("auto", "float32", "tf32", "bfloat16", "float16", "autocast-bfloat16", "autocast-float16")
BATCH_SIZES = {"cpu": 16, "cuda": 128}
LATENCY_REPEATS = 100
MAX_IMG_SIZE = 4096
SEED = 0

EXAMPLES = """\
examples:
  python benchmarks/throughput.py                              the default comparison, two minutes on a CPU
  python benchmarks/throughput.py --models paper --batch-size best           all models of the paper's tables
  python benchmarks/throughput.py --mode training --precision autocast-bfloat16 --variants reference auto compiled
  python benchmarks/throughput.py --device cuda --precision bfloat16 float16 --batch-size 32 128 512
  python benchmarks/throughput.py --models t2t_vit_14 --latency --variants auto frozen cuda-graph
  python benchmarks/throughput.py --models zoo --variants reference frozen onnx aoti        exported programs
  python benchmarks/throughput.py --images ~/imagenet/val --with-loader      decoding included
  python benchmarks/throughput.py --models paper --output run.json           after an interruption: --resume run.json

exit status: 0, 1 if a variant's results are wrong, 2 if an argument is, 130 if interrupted
"""


def batch_size(text: str) -> int | str:
    """An argparse type: a number of images, ``max`` or ``best``."""
    return text if text in ("max", "best") else positive_int(text)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, without torch: help and mistakes are answered at once."""
    parser = OneLineParser(
        prog="throughput.py", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
        choices=PRECISIONS,
        metavar="NAME",
        help=f"{', '.join(PRECISIONS)}; auto: bfloat16 on CUDA (float16 where that is missing), float32 elsewhere",
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
    source.add_argument("--synthetic", action="store_true", help="noise in place of photographs")
    add("--with-loader", action="store_true", help="reading, decoding and cropping --images is part of the time")
    add("--output", type=Path, metavar="JSON", help="file, or a folder for it; default: benchmarks/results/local")
    add("--resume", type=Path, metavar="JSON", help="measure what is missing in this file, with its own arguments")
    add("--no-plot", action="store_true", help="no picture beside the result file")
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parse_arguments(argv)
    path: Path | None = None

    def keep(target: Path, result: dict[str, Any]) -> None:
        nonlocal path
        path = target
        write_json(target, result)

    try:
        result = measure(options, argv, keep)
        from _plots import plot_macs
        from _show import show

        show(result)
        assert path is not None
        plain = "--no-plot" in shlex.split(result["command"])  # a resumed run's, too
        pictures = [] if plain else plot_macs(result["rows"], result["hardware"], path)
    except UsageError as error:
        print(f"throughput.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "nothing was written" if path is None else f"go on with --resume {shlex.quote(str(path))}"
        print(f"throughput.py: interrupted, {kept}", file=sys.stderr)
        return 130
    print(f"results: {path}")
    if pictures:
        print(f"plot: {' '.join(map(str, pictures))}")
    return 0 if result["passed"] else 1


def measure(
    options: argparse.Namespace, argv: list[str], keep: Callable[[Path, dict[str, Any]], None]
) -> dict[str, Any]:
    """Measure all rows; ``keep`` is called with the result whenever more of it is known.

    Raises:
        UsageError: An argument is impossible here.
    """
    started, date = time.perf_counter(), datetime.now().astimezone()
    before = None if options.resume is None else read_json("--resume", options.resume)
    if before is not None:
        _check_whole(options.resume, before)
        argv = shlex.split(before["command"])[2:]
        resumed, options = options, parse_arguments(argv)
        options.output, options.resume = resumed.resume, resumed.resume
    with _progress() as progress:
        task = progress.add_task("loading torch and timm", total=None)

        def report(what: str, done: int, planned: int) -> None:
            progress.update(task, description=what, completed=done, total=planned)

        import _measure
        import _models
        import _rates
        import torch
        from _images import load_images
        from _loader import Loader
        from _variants import product_dtype

        from t2t_fast import use_backend
        from t2t_fast.env import collect_env

        device = _measure.select_device(options.device)
        precisions = [_measure.select_precision(name, device) for name in options.precision]
        models = _models.resolve_names(options.models)
        sizes = [1] if options.latency else options.batch_size or [BATCH_SIZES.get(device.type, 32)]
        if "max" in sizes and device.type != "cuda":
            raise UsageError(
                f"--batch-size: max is for CUDA devices, {device.type!r} has no limit of its own; try best"
            )
        env = collect_env()
        hardware = _measure.device_name(device, env)
        path = result_path(options.output, hardware, env, date)
        result: dict[str, Any] = {
            "benchmark": "throughput",
            "date": date.isoformat(timespec="seconds"),
            "command": command_line("throughput", argv),
            "device": device.type,
            "hardware": hardware,
            "seed": SEED,
            "time_budget": options.time_budget,
            "with_loader": options.with_loader,
            "complete": False,
            "passed": True,
            "operations_per_second": {},
            "rows": [],
            "total_seconds": 0.0,
            "environment": env,
        }
        if before is not None:
            _check_same(before, result)
            kept = ("rows", "date", "command", "operations_per_second")
            result |= {name: before[name] for name in kept if name in before}
            started -= before["total_seconds"]

        def save(rows: Sequence[Any] = ()) -> None:
            """Keep what is known, and of ``rows`` that are being timed what they have so far."""
            now = [*result["rows"], *(_measure.figures(row) | {"asked": asked[id(row)]} for row in rows)]
            _measure.relate(now, result["operations_per_second"])
            result["passed"] = all(row["passed"] for row in now)
            result["total_seconds"] = round(time.perf_counter() - started, 1)
            keep(path, result | {"rows": now})

        def measure_product(precision: str) -> None:
            """At best: before the rows and after them, for a machine that others slow down at times."""
            report("a large matrix product", 0, 1)
            rate = _rates.operations_per_second(product_dtype(precision), device)
            rates = result["operations_per_second"]
            rates[precision] = max(rate, rates.get(precision, 0.0))

        kinds = list(itertools.product(options.mode, precisions, dict.fromkeys(options.img_size), sizes))
        largest = max((size for size in sizes if isinstance(size, int)), default=BATCH_SIZES.get(device.type, 32))
        done = {tuple(row["asked"]) for row in result["rows"] if row["status"] != "pending"}
        result["rows"] = [row for row in result["rows"] if tuple(row["asked"]) in done]
        asked: dict[int, tuple[Any, ...]] = {}
        with use_backend("auto"):  # whatever T2T_FAST_BACKEND says
            for number, (mode, precision, img_size, size) in enumerate(kinds):
                images, origin = load_images(options.images, options.synthetic, min(largest, 256), img_size, SEED)
                result["images"] = origin
                oracle = _measure.Oracle(images, device, SEED)
                rows = make_rows(models, options, mode, precision, img_size)
                asked = {id(row): (*row.key[:4], str(size), img_size) for row in rows}
                rows = [row for row in rows if asked[id(row)] not in done]
                torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
                torch.backends.cudnn.allow_tf32 = precision == "tf32"  # convolutions have a switch of their own
                measure_product(precision)
                for row in rows:
                    row.batch_size = size if isinstance(size, int) else 1
                    if isinstance(size, str):
                        report(f"{size} batch of {row.label}", number, len(kinds))
                        search = _measure.largest_batch if size == "max" else _measure.best_batch
                        row.batch_size = search(row, oracle, *([] if size == "max" else [1024]))
                        if row.batch_size == 0:
                            row.batch_size = 1
                            row.status = "out of memory" if row.status == "pending" else row.status
                loader = Loader(options.images, img_size, device) if options.with_loader else None

                def seconds_of(row: Any, loader: Any = loader, oracle: Any = oracle) -> float:
                    if loader is None:
                        if row.images is None:
                            row.images = _measure.batch_for(row, oracle)
                        return _measure.time_step(row, row.images)
                    return _measure.time_stream(
                        row, lambda row: loader.next(row.batch_size, row.weight_dtype), loader.ahead
                    )

                # Two of the largest batches do not fit at once.
                groups = [[row] for row in rows] if size == "max" else [rows]
                repeats = options.repeats or (LATENCY_REPEATS if options.latency else None)
                budget = options.time_budget / len(kinds) / max(1, len(groups))
                for group in groups:
                    keep_group = functools.partial(save, group)
                    waiting = [row for row in group if row.status == "pending"]
                    ready = _measure.prepare(waiting, oracle, report, keep_group)
                    _measure.time_rows(ready, seconds_of, repeats, budget, report, keep_group)
                    for row in group:
                        row.drop()
                        result["rows"].append(_measure.figures(row) | {"asked": asked[id(row)]})
                    save()
                measure_product(precision)
    result["complete"] = True
    save()
    return result


def make_rows(
    models: Sequence[str], options: argparse.Namespace, mode: str, precision: str, img_size: int
) -> list[Any]:
    """A row for every model and variant; batch sizes are still to be set."""
    import _models
    from _variants import Row

    variants = list(dict.fromkeys(options.variants or DEFAULT_VARIANTS[mode]))
    compiled: list[str | None] = ["compiled"] if "compiled" in variants else []
    rows = []
    for name in models:
        cost = _models.count(name, img_size)
        for variant in variants if _models.is_ours(name) else [None, *compiled]:
            rows.append(Row(name, variant, mode, precision, 1, img_size, cost.params, cost.macs))
    return rows


def _check_whole(path: Path, before: dict[str, Any]) -> None:
    """Raise UsageError unless the file is one of this script's."""
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
