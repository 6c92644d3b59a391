"""``python -m t2t_fast env``: describe this environment."""

from __future__ import annotations

import argparse
from typing import Any

from ..env import collect_env, format_env
from .common import add_command, output_json
from .streams import write_output


def add_parser(subparsers: Any) -> None:
    """Add the ``env`` command to ``subparsers``, the result of ``ArgumentParser.add_subparsers``."""
    parser = add_command(
        subparsers,
        "env",
        "show versions, devices and settings, for bug reports.",
        """
        t2t-fast env
        t2t-fast env --json > environment.json
        """,
    )
    parser.add_argument("--json", action="store_true", help="write JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    environment = collect_env()
    if args.json:
        output_json(environment)
    else:
        write_output(format_env(environment) + "\n")
    return 0
