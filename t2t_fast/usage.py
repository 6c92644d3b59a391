"""Errors of command lines: an exception for those that the user can fix, and a parser that reports them in one line."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn


class UsageError(Exception):
    """The command line asks for something impossible. The message is one line: the reason, and what is possible."""


class OneLineParser(argparse.ArgumentParser):
    """A parser that reports an error in one line, without the usage in front, and keeps the layout of descriptions."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": argparse.RawDescriptionHelpFormatter, **kwargs})

    def error(self, message: str) -> NoReturn:
        program = self.prog.partition(" ")[0]  # without the command
        self.exit(2, f"{program}: error: {one_line(message)} (see {self.prog} --help)\n")


def one_line(text: str) -> str:
    """``text`` as one line of :func:`printable` characters."""
    return printable(" ".join(line.strip() for line in text.splitlines() if line.strip()))


def printable(text: str) -> str:
    """``text`` with escapes for what a terminal cannot show: undecodable bytes of file names, and control codes."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
