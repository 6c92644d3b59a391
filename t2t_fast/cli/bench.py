"""``python -m t2t_fast bench``: measure images per second on this machine."""

from __future__ import annotations

import argparse
from typing import Any

from ..bench import throughput
from .streams import PROG


def add_parser(subparsers: Any) -> None:
    """Add the ``bench`` command to ``subparsers``, the result of ``ArgumentParser.add_subparsers``."""
    # No argument begins with NUL, so all of them, also --help, go to the benchmark's own parser.
    parser = subparsers.add_parser(
        "bench", help="measure images per second, beside timm's models", add_help=False, prefix_chars="\0"
    )
    parser.add_argument("arguments", nargs="*")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code: 1 if results are wrong, 2 if an argument is, 130 after Ctrl-C."""
    return throughput.main(args.arguments, prog=f"{PROG} bench")
