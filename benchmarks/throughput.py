"""Images per second of T2T-ViT with each backend, beside timm's models, on the same images. See README.md here."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from _common import OneLineParser, UsageError, positive_int, positive_seconds, result_path, write_json
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an uninstalled checkout; an installed package comes first

MODELS = ("t2t_vit_14", "deit_small_patch16_224", "vit_small_patch16_224", "resnet50")
BACKENDS = ("reference", "auto")
ALL_BACKENDS = ("auto", "reference", "aten", "triton", "native")
BATCH_SIZES = {"cpu": 16, "cuda": 128}
SEED = 0
WIDTH = 108  # of the table

EXAMPLES = """\
examples:
  python benchmarks/throughput.py                              the default comparison, one to two minutes on a CPU
  python benchmarks/throughput.py --device cuda --batch-size 256 --dtype float16
  python benchmarks/throughput.py --models t2t_vit_7 t2t_vit_24 swin_tiny_patch4_window7_224
  python benchmarks/throughput.py --models t2t_vit_14 --backends reference aten auto --img-size 384
  python benchmarks/throughput.py --images ~/photos --time-budget 300 --output photos.json

exit status: 0, 1 if a backend's logits are wrong, 2 if an argument is
"""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, without torch: help and mistakes are answered at once."""
    parser = OneLineParser(
        prog="throughput.py", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", default=list(MODELS), metavar="NAME", help=f"default: {' '.join(MODELS)}")
    add(
        "--backends",
        nargs="+",
        default=list(BACKENDS),
        choices=ALL_BACKENDS,
        metavar="NAME",
        help=f"of the T2T-ViTs: {', '.join(ALL_BACKENDS)}; default: {' '.join(BACKENDS)}",
    )
    add("--batch-size", type=positive_int, metavar="N", help="default: 16 on a CPU, 128 on CUDA, 32 elsewhere")
    add("--img-size", type=positive_int, default=224, metavar="PIXELS", help="default: 224")
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="auto: bfloat16 on CUDA (float16 where that is missing), float32 elsewhere",
    )
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps", "xpu"), help="auto: a GPU if there is one")
    add("--repeats", type=positive_int, metavar="N", help="rounds; default: what the time budget allows, 5 to 100")
    add("--time-budget", type=positive_seconds, default=45.0, metavar="SECONDS", help="for the rounds; default: 45")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--images", type=Path, metavar="FOLDER", help="crop the images in this folder, at any depth")
    source.add_argument("--synthetic", action="store_true", help="noise in place of photographs")
    add("--output", type=Path, metavar="JSON", help="file, or a folder for it; default: benchmarks/results/local")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse_arguments(argv)
    try:
        path, result = measure(options, argv)
        show(result)
        write_json(path, result)
    except UsageError as error:
        print(f"throughput.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("throughput.py: interrupted, nothing was written", file=sys.stderr)
        return 130
    print(f"results: {path}")
    return 0 if result["passed"] else 1


def measure(options: argparse.Namespace, argv: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """Where the result file goes, and its content.

    Raises:
        UsageError: An argument is impossible here.
    """
    started = time.perf_counter()
    date = datetime.now().astimezone()
    with _progress() as progress:
        task = progress.add_task("loading torch and timm", total=None)

        def report(done: int, planned: int) -> None:
            progress.update(task, description="timing", completed=done, total=planned)

        import _measure
        import torch
        from _images import load_images

        from t2t_fast import use_backend
        from t2t_fast.env import collect_env

        device = _measure.select_device(options.device)
        dtype = _measure.select_dtype(options.dtype, device)
        _measure.check_names(options.models)
        batch_size = options.batch_size or BATCH_SIZES.get(device.type, 32)
        env = collect_env()
        hardware = _measure.device_name(device, env)
        path = result_path(options.output, hardware, str(torch.__version__), date)

        images, origin = load_images(options.images, options.synthetic, batch_size, options.img_size, SEED)
        images = images.to(device, dtype)
        rows = []
        for name in dict.fromkeys(options.models):
            progress.update(task, description=f"building {name}")
            rows += _measure.build_rows(name, list(dict.fromkeys(options.backends)), options.img_size, SEED)
        for row in rows:
            row.module.to(device, dtype)
        with use_backend("auto"):  # whatever T2T_FAST_BACKEND says
            progress.update(task, description="checking the logits in float64")
            checked = _measure.check(rows, images)
            trusted = [row for row in rows if row.passed]
            progress.reset(task)
            _measure.time_rows(trusted, images, options.repeats, options.time_budget, report)
    baseline, figures = _measure.summarise(rows, batch_size)
    return path, {
        "benchmark": "throughput",
        "date": date.isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/throughput.py", *argv]),
        "device": device.type,
        "hardware": hardware,
        "dtype": str(dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "img_size": options.img_size,
        "images": origin,
        "seed": SEED,
        "repeats": max(len(row.times) for row in rows),
        "time_budget": options.time_budget,
        "tolerance": _measure.TOLERANCES[dtype],
        "checked_images": checked,
        "passed": len(trusted) == len(rows),
        "baseline": baseline,
        "rows": figures,
        "total_seconds": round(time.perf_counter() - started, 1),
        "environment": env,
    }


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("left")
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def show(result: dict[str, Any]) -> None:
    """Print the table, how to read it, and what failed."""
    console = Console(highlight=False, markup=False)
    console.width = max(console.width, WIDTH)  # a narrow terminal wraps lines; it must not cut figures off
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("model", no_wrap=True)
    table.add_column("backend")
    for heading in ("params\n(M)", "MACs\n(G)", "images/s", "ms/batch", "speed", "error", "top-1"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result["rows"]:
        table.add_row(*_cells(row))
    console.print(table)
    console.print()

    threads = f", {result['environment']['cpu']['torch_threads']} threads" if result["device"] == "cpu" else ""
    size = result["img_size"]
    console.print(
        f"{result['hardware']}{threads}, torch {result['environment']['torch']}, {result['dtype']}, inference on "
        f"batches of {result['batch_size']} images, {size} x {size}, {result['images']}; "
        f"rounds: {result['repeats']}, {result['total_seconds']:.0f} s in all."
    )
    speed = f" speed: relative to {result['baseline']}, median of the rounds." if result["baseline"] else ""
    console.print(
        f"images/s: median of the rounds ± half the interquartile range.{speed} MACs count the attention products."
    )
    if any(row["backend"] for row in result["rows"]):
        console.print(
            "error: relative norm of the logits' difference from the reference in float64, same random weights and "
            f"images ({result['checked_images']}); accepted up to {result['tolerance']:.0e}."
        )
    for row in result["rows"]:
        if not row["passed"]:
            console.print(
                f"WRONG: {row['model']} with backend {row['backend']}: error {_error(row)}, accepted up to "
                f"{result['tolerance']:.0e}; its speed was not measured.",
                style="bold red",
            )


def _cells(row: dict[str, Any]) -> list[str]:
    macs = row["macs"] / 1e9
    cells = [row["model"], row["backend"] or "-", f"{row['params'] / 1e6:.1f}", f"{macs:.{1 if macs >= 1 else 2}f}"]
    if row["passed"]:
        digits = 0 if row["images_per_second"] >= 1000 else 1 if row["images_per_second"] >= 10 else 2
        spread = "" if row["spread"] is None else f" ± {row['spread']:.{digits}f}"
        cells.append(f"{row['images_per_second']:.{digits}f}{spread}")
        cells.append(f"{row['ms_per_batch']:.1f}")
        cells.append("-" if row["speed"] is None else f"{row['speed']:.2f}x")
    else:
        cells += ["wrong", "-", "-"]
    if row["backend"] is None:
        return [*cells, "-", "-"]
    return [*cells, _error(row), f"{row['top1']:.0%}"]


def _error(row: dict[str, Any]) -> str:
    return "nan" if row["error"] is None else f"{row['error']:.1e}"


if __name__ == "__main__":
    sys.exit(main())
