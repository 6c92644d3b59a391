"""``python -m t2t_fast list``: the models, with the paper's figures."""

from __future__ import annotations

import argparse
from typing import Any

from rich.table import Table

from ..models import list_models
from ..models.variants import VARIANTS
from ..usage import UsageError
from .common import add_command, output_json, write_table


def add_parser(subparsers: Any) -> None:
    """Add the ``list`` command to ``subparsers``, the result of ``ArgumentParser.add_subparsers``."""
    parser = add_command(
        subparsers,
        "list",
        "list the models with the paper's figures and the released weights. Figures are for 224 px, MACs for one "
        "image; t2t-fast macs counts them.",
        """
        t2t-fast list
        t2t-fast list 't2t_vit_t_*'
        t2t-fast list --json
        """,
    )
    parser.add_argument("pattern", metavar="PATTERN", nargs="?", default="*", help="shell-style pattern of names")
    parser.add_argument("--json", action="store_true", help="write JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    names = list_models(args.pattern) if args.pattern else []  # for timm "" matches every name
    if not names:
        raise UsageError(f"no model matches {args.pattern!r}; names: {', '.join(VARIANTS)}")
    if args.json:
        output_json([_describe(name) for name in names])
        return 0
    table = Table()
    table.add_column("model")
    for heading in ("top-1 %", "params M", "MACs G"):
        table.add_column(heading, justify="right")
    table.add_column("released weights")
    for name in names:
        published, weights = VARIANTS[name].published, VARIANTS[name].weights
        figures = (published.top1, published.params_m, published.macs_g) if published else ("–",) * 3
        tags = ", ".join(f"{tag} ({size} px)" for tag, (_, size) in weights.items()) or "–"
        table.add_row(name, *map(str, figures), tags)
    write_table(table)
    return 0


def _describe(name: str) -> dict[str, Any]:
    variant = VARIANTS[name]
    published = variant.published
    return {
        "name": name,
        "top1": published.top1 if published else None,
        "params_m": published.params_m if published else None,
        "macs_g": published.macs_g if published else None,
        "weights": {tag: {"url": variant.url(tag), "image_size": size} for tag, (_, size) in variant.weights.items()},
    }
