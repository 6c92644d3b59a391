"""Shared by the commands: argument types, tables, JSON, checks of files to write."""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..files import check_target, json_text, open_descriptor, write_text
from ..usage import UsageError
from .streams import write_output

MAX_PIXELS = 8192  # per side: the tokens of such a square image and its position table take gigabytes
MAX_COUNT = 2**31 - 1


def add_command(subparsers: Any, name: str, description: str, examples: str) -> argparse.ArgumentParser:
    """Add a command to ``subparsers``, the result of ``ArgumentParser.add_subparsers``; ``examples`` end its help."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=description.partition(".")[0],
        description=textwrap.fill(description, 80),
        epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples).strip("\n"), "  "),
    )
    return parser


def file_name(text: str) -> str:
    """A file name, as an argparse type. An empty one, as from an unset shell variable, is refused."""
    if not text:
        raise argparse.ArgumentTypeError("'' is not a file name")
    return text


def pixels(text: str) -> int:
    """A positive number of pixels, as an argparse type."""
    return _positive(text, "a number of pixels", MAX_PIXELS)


def count(text: str) -> int:
    """A positive integer, as an argparse type."""
    return _positive(text, "a positive integer", MAX_COUNT)


def _positive(text: str, meaning: str, largest: int) -> int:
    digits = text.lstrip("0")
    if not (text.isdecimal() and digits):
        raise argparse.ArgumentTypeError(f"{text!r} is not {meaning} (names come before the options, or after --)")
    if len(digits) > len(str(largest)) or int(text) > largest:  # Python refuses to read thousands of digits
        raise argparse.ArgumentTypeError(f"{textwrap.shorten(text, 30)} is too large; accepted: up to {largest}")
    return int(text)


def image_size(values: list[int] | None) -> tuple[int, int] | None:
    """The (height, width) given by ``--img-size H [W]``.

    Raises:
        UsageError: More than two values.
    """
    if values is None:
        return None
    if len(values) > 2:
        raise UsageError(f"--img-size takes H or H W, got {' '.join(map(str, values))}")
    return values[0], values[-1]


def error_console() -> Console:
    """Standard error, for progress."""
    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def write_table(table: Table) -> None:
    """Write to standard output. Unless that is a terminal, lines are as long as necessary and nothing is cut."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 10_000)
    with console.capture() as capture:
        console.print(table)
    write_output(capture.get())


def means_standard_output(target: str) -> bool:
    """Whether ``--json TARGET`` means standard output."""
    return target == "-" or open_descriptor(target) == 1


def output_json(data: Any, target: str = "-") -> None:
    """Write ``data`` as JSON: to standard output for ``-``, else to the file ``target``, completely or not at all."""
    text = json_text(data)
    if means_standard_output(target):
        write_output(text)
    else:
        write_text(target, text)


def check_new(target: str, force: bool) -> None:
    """Check that ``target`` can be written to, and is not an existing file unless ``--force`` is given.

    Raises:
        UsageError: It is an existing file.
        OSError: It cannot be written to.
    """
    check_target(target)
    if Path(target).is_file() and not force:
        raise UsageError(f"{target}: exists; pass --force to overwrite it")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` reports that the system or a device is out of memory."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)
