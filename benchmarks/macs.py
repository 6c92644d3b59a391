"""Parameters, multiply-accumulates and activations of the models, beside the paper's figures.

    python benchmarks/macs.py                                   # all models of the paper's tables that timm or we have
    python benchmarks/macs.py --models t2t_vit_14 resnet50 --img-size 384 --output benchmarks/results

Attention products count. Activations are the values that products and convolutions write. Only shapes are computed. The
paper prints one decimal: a deviation below half of its last digit is none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from t2t_fast.bench.common import OneLineParser, UsageError, command_line, positive_int, result_path, write_json


def main(argv: Sequence[str] | None = None) -> int:
    """Count and return the exit status: 0, or 2 if an argument is impossible."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = OneLineParser(prog="macs.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["paper"], metavar="NAME", help="or paper, the default")
    parser.add_argument("--img-size", type=positive_int, default=224, metavar="PIXELS", help="default: 224")
    parser.add_argument("--output", type=Path, metavar="JSON", help="file, or a folder for it; default: none")
    options = parser.parse_args(argv)
    try:
        rows = count(options)
        if options.output is not None:
            path = save(rows, options, argv)
    except UsageError as error:
        parser.error(str(error))
    from t2t_fast.cli.macs import table_of

    console = Console(highlight=False)
    console.width = max(console.width, 110)
    console.print(table_of(rows))
    if options.output is not None:
        print(f"results: {path}")
    return 0


def count(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per model.

    Raises:
        UsageError: An unknown model, or a size that it does not take.
    """
    from t2t_fast import list_models
    from t2t_fast.bench import models
    from t2t_fast.macs import published

    names = models.resolve_names(options.models)
    if options.models == ["paper"]:
        names = [*list_models(), *(name for name in names if not models.is_ours(name))]
    rows = []
    size = (options.img_size, options.img_size)
    for name in track(names, "counting", console=Console(stderr=True), transient=True):
        cost = models.count(name, options.img_size)
        params, macs = published(name, size)
        rows.append(
            {
                "name": name,
                "image_size": list(size),
                "params": cost.params,
                "macs": cost.macs,
                "activations": cost.activations,
                "published_params_m": params,
                "published_macs_g": macs,
                "params_deviation_percent": None if params is None else 100 * (cost.params / 1e6 / params - 1),
                "macs_deviation_percent": None if macs is None else 100 * (cost.macs / 1e9 / macs - 1),
                "rounds_to_published": None if macs is None else round(cost.macs / 1e9, 1) == macs,
            }
        )
    return rows


def save(rows: list[dict[str, Any]], options: argparse.Namespace, argv: list[str]) -> Path:
    """Write the result file.

    Raises:
        UsageError: Nothing can be written there.
    """
    from t2t_fast.env import collect_env

    env, date = collect_env(), datetime.now().astimezone()
    path = result_path(options.output, f"macs-{options.img_size}px", env, date)
    content = {
        "benchmark": "macs",
        "date": date.isoformat(timespec="seconds"),
        "command": command_line("macs", argv),
        "rows": rows,
        "environment": env,
    }
    write_json(path, content)
    return path


if __name__ == "__main__":
    sys.exit(main())
