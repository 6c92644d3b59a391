"""What the commands share."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import textwrap
from pathlib import Path
from typing import Any

from rich.console import Console

from ..checks import UsageError

PROG = "t2t-fast"


def add_command(subparsers: Any, name: str, description: str, examples: str) -> argparse.ArgumentParser:
    """Add a command to what ``argparse.ArgumentParser.add_subparsers`` returned; ``examples`` end its ``--help``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=description.partition(".")[0],
        description=textwrap.fill(description, 80),
        epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples).strip("\n"), "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def pixels(text: str) -> int:
    """A positive number of pixels, as an argparse type."""
    return _positive(text, "a number of pixels")


def count(text: str) -> int:
    """A positive integer, as an argparse type."""
    return _positive(text, "a positive integer")


def _positive(text: str, meaning: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not {meaning} (names come before the options, or after --)")
    return int(text)


def image_size(values: list[int] | None) -> tuple[int, int] | None:
    """The (height, width) that ``--img-size H [W]`` means.

    Raises:
        UsageError: More than two values.
    """
    if values is None:
        return None
    if len(values) > 2:
        raise UsageError(f"--img-size takes H or H W, got {' '.join(map(str, values))}")
    return values[0], values[-1]


def output_console() -> Console:
    """Standard output. Where it is no terminal, lines are as long as they need to be, so that nothing is cut."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 10_000)


def error_console() -> Console:
    """Standard error, for messages and progress."""
    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def printable(text: str) -> str:
    """``text`` without what a file name may hold and a terminal cannot take: undecodable bytes and control codes."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def check_json_target(target: str) -> None:
    """Raise :class:`UsageError` now, not after the work, if :func:`write_json` could not write there."""
    path = Path(target)
    if target != "-" and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UsageError(f"--json {target}: not a file in an existing folder")


def write_json(data: Any, target: str = "-") -> None:
    """Write ``data`` to the file ``target``, whole or not at all, or to standard output for ``-``."""
    text = json.dumps(data, indent=2, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    path = Path(target).resolve()  # a link is followed, not replaced
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
