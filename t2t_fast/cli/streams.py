"""Standard output, standard error and log records of the command line, whatever they are connected to."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from ..files import errors_named
from ..usage import one_line

PROG = "t2t-fast"
STANDARD_OUTPUT = "standard output"  # the file name in errors


@contextlib.contextmanager
def usable_streams() -> Iterator[None]:
    """Standard streams that take every character; one that is closed refuses output, or drops messages.

    Characters that the encoding of standard output lacks are written as escapes.
    """
    with contextlib.ExitStack() as stack:
        if sys.stderr is None:
            messages = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stderr(messages))
        if sys.stdout is None:
            # Writing to what is open for reading alone fails as writing to the closed descriptor would.
            refusing = stack.enter_context(os.fdopen(os.open(os.devnull, os.O_RDONLY), "w"))
            stack.enter_context(contextlib.redirect_stdout(refusing))
        elif isinstance(sys.stdout, io.TextIOWrapper):
            stack.callback(sys.stdout.reconfigure, errors=sys.stdout.errors)
            sys.stdout.reconfigure(errors="backslashreplace")
        yield


def write_output(text: str) -> None:
    """Write to standard output, at once.

    Raises:
        OSError: Standard output is full or closed; ``filename`` is :data:`STANDARD_OUTPUT`.
    """
    try:
        with errors_named(STANDARD_OUTPUT):
            sys.stdout.write(text)
            sys.stdout.flush()
    except OSError:
        _discard(sys.stdout)
        raise


def flush_output() -> None:
    """Write out what standard output has buffered; raises as :func:`write_output`."""
    write_output("")


def say(message: str) -> None:
    """Write a message to standard error, as one line. Where that is full, the message is lost."""
    try:
        print(f"{PROG}: {one_line(message)}", file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def _discard(stream: TextIO) -> None:
    """Drop what ``stream`` holds and gets from now on, so that Python does not fail to write it when it exits."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)


@contextlib.contextmanager
def log_records_shown() -> Iterator[None]:
    """Warnings and errors that libraries log, shown as the command line's own messages."""
    handler, root = _Messages(logging.WARNING), logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


class _Messages(logging.Handler):
    def emit(self, record: logging.LogRecord) -> Any:
        say(f"{record.levelname.lower()}: {record.getMessage()}")
