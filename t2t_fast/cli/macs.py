"""``python -m t2t_fast macs``: count multiply-accumulates, beside the paper's figures."""

from __future__ import annotations

import argparse
import difflib
import logging
import shlex
from datetime import datetime
from pathlib import Path
from typing import Any

import timm
import torch
from rich.progress import Progress
from rich.table import Table

from ..bench import common as bench
from ..bench import tables
from ..bench.models import PAPER_VIT_SMALL, SETS, create
from ..env import collect_env
from ..macs import count_macs, own_image_size, published
from ..models import list_models
from ..usage import UsageError
from .common import add_command, error_console, image_size, output_json, pixels, write_table
from .streams import say


def add_parser(subparsers: Any) -> None:
    """Add the ``macs`` command to ``subparsers``, the result of ``ArgumentParser.add_subparsers``."""
    parser = add_command(
        subparsers,
        "macs",
        "count parameters and multiply-accumulates. Matmuls inside attention and of the Performer's features count; "
        "norms, softmax and activation functions do not. A call runs fewer where its last block runs for the cls token "
        "alone: the column 'run G'. Only shapes are computed: nothing is downloaded or run.",
        """
        t2t-fast macs
        t2t-fast macs t2t_vit_14 resnet50 'deit_small*'
        t2t-fast macs t2t_vit_14 --img-size 384
        t2t-fast macs --json > macs.json
        t2t-fast macs zoo paper --output benchmarks/results
        """,
    )
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="*",
        help="names or patterns, also timm's; zoo: all of this package, the default; paper: all in the paper's tables",
    )
    parser.add_argument("--img-size", nargs="+", type=pixels, metavar=("H", "W"), help="pixels (default: the model's)")
    parser.add_argument("--json", action="store_true", help="write JSON")
    parser.add_argument(
        "--output", type=Path, metavar="JSON", help="also write a result file of the benchmarks; a file or a folder"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code: 1 if some models cannot be counted, 2 if none can."""
    size = image_size(args.img_size)
    names = _resolve_names(args.models) if args.models else [*list_models(), "t2t_vit_14.in1k_384"]
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it logs its exceptions as well
    errors = error_console()
    rows = []
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        for name in progress.track(names, description="counting"):
            try:
                rows.append(measure(name, size))
            except Exception as error:
                # The model does not take this size, or no images at all: models of timm raise anything.
                reason = next(iter(str(error).splitlines()), "")
                say(f"{name}: cannot be counted: {type(error).__name__}: {reason}")
    if rows and args.output is not None:
        say(f"results: {_save(rows, args)}")
    if args.json:
        output_json(rows)
    elif rows:
        write_table(table_of(rows))
    return 0 if len(rows) == len(names) else 1 if rows else 2


def _resolve_names(patterns: list[str]) -> list[str]:
    names: dict[str, None] = {}
    for pattern in patterns:
        is_name = timm.is_model(pattern) or pattern == PAPER_VIT_SMALL
        found = [pattern] if is_name else SETS.get(pattern) or (timm.list_models(pattern) if pattern else [])
        if not found:
            close = difflib.get_close_matches(pattern, timm.list_models(), n=3)
            raise UsageError(f"no model matches {pattern!r}" + (f"; close: {', '.join(close)}" if close else ""))
        names.update(dict.fromkeys(found))
    return list(names)


def measure(name: str, size: tuple[int, int] | None) -> dict[str, Any]:
    """Parameters, multiply-accumulates and activations of a model at ``size`` or its own, beside the paper's."""
    with torch.device("meta"):
        model = create(name)
    size = size or own_image_size(model)
    macs = count_macs(model, size)
    assert size is not None  # else count_macs raised
    params_m, macs_g = published(name, size)
    return {
        "name": name,
        "image_size": list(size),
        "params": macs.params,
        "macs": macs.macs,
        "executed": macs.executed,
        "activations": macs.activations,
        "published_params_m": params_m,
        "published_macs_g": macs_g,
        "params_deviation_percent": _deviation(macs.params / 1e6, params_m),
        "macs_deviation_percent": _deviation(macs.macs / 1e9, macs_g),
        "rounds_to_published": None if macs_g is None else round(macs.macs / 1e9, 1) == macs_g,
    }


def _deviation(measured: float, published: float | None) -> float | None:
    return None if published is None else round(100 * (measured / published - 1), 2)


def _save(rows: list[dict[str, Any]], args: argparse.Namespace) -> Path:
    """Write a result file, named by the image sizes, and return its path."""
    env, date = collect_env(), datetime.now().astimezone()
    sizes = dict.fromkeys(tables.pixels(row["image_size"]) for row in rows)
    path = bench.result_path(args.output, f"macs-{'-'.join(sizes)}px", env, date)
    size = ["--img-size", *map(str, args.img_size)] if args.img_size else []
    command = shlex.join(["python", "-m", "t2t_fast", "macs", *args.models, *size])
    bench.write_json(path, bench.new_result("macs", date, command, env) | {"rows": rows})
    return path


def table_of(rows: list[dict[str, Any]]) -> Table:
    """A table with a line per model."""
    table = Table()
    table.add_column("model")
    for heading in ("pixels", "params M", "paper", "±%", "MACs G", "paper", "±%", "run G", "activations M"):
        table.add_column(heading, justify="right")
    for row in rows:
        height, width = row["image_size"]
        table.add_row(
            row["name"],
            f"{height}x{width}",
            f"{row['params'] / 1e6:.2f}",
            _cell(row["published_params_m"], ".1f"),
            _cell(row["params_deviation_percent"], "+.1f"),
            f"{row['macs'] / 1e9:.3f}",
            _cell(row["published_macs_g"], ".1f"),
            _cell(row["macs_deviation_percent"], "+.1f"),
            f"{row['executed'] / 1e9:.3f}",
            f"{row['activations'] / 1e6:.1f}",
        )
    return table


def _cell(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)
