"""Standard output, standard error and log records of the command line, also if they are full, closed or ASCII."""

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
    """A context in which the standard streams can be written to.

    Characters that the encoding of standard output lacks are written as escapes. If standard output is closed, writing
    raises ``OSError``; if standard error is closed, messages are dropped.
    """
    with contextlib.ExitStack() as stack:
        if sys.stderr is None:
            messages = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stderr(messages))
        if sys.stdout is None:
            # A file opened for reading: writing to it fails, as it would for the closed descriptor.
            refusing = stack.enter_context(os.fdopen(os.open(os.devnull, os.O_RDONLY), "w"))
            stack.enter_context(contextlib.redirect_stdout(refusing))
        elif isinstance(sys.stdout, io.TextIOWrapper):
            stack.callback(sys.stdout.reconfigure, errors=sys.stdout.errors)
            sys.stdout.reconfigure(errors="backslashreplace")
        yield


def write_output(text: str) -> None:
    """Write to standard output and flush it.

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
    """Flush standard output; raises as :func:`write_output`."""
    write_output("")


def say(message: str) -> None:
    """Write a message to standard error, as one line; it is lost if standard error is full."""
    try:
        print(f"{PROG}: {one_line(message)}", file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def _discard(stream: TextIO) -> None:
    """Drop all buffered and further output of ``stream``, so that flushing it at exit does not fail."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)


@contextlib.contextmanager
def log_records_shown() -> Iterator[None]:
    """A context in which logged warnings and errors appear as messages of the command line."""
    handler, root = _Messages(logging.WARNING), logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


class _Messages(logging.Handler):
    def emit(self, record: logging.LogRecord) -> Any:
        say(f"{record.levelname.lower()}: {record.getMessage()}")
