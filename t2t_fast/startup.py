"""Ctrl-C and bad environment variables while the command line imports this package, which takes seconds."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """A context around this package's imports.

    If Python is starting ``t2t-fast`` or ``python -m`` with a module of this package, Ctrl-C ends the program with exit
    code 130, and an environment variable with a bad value ends it with one line and exit code 2; ``cli.main`` could not
    handle either so early. Otherwise the context does nothing.
    """
    if not _is_command():
        yield
        return
    with _interrupt_exits():
        try:
            from . import config  # noqa: F401
        except ValueError as error:
            if sys.stderr is not None:
                print("t2t-fast: error:", error, file=sys.stderr)
            raise SystemExit(2) from None
        yield


def _is_command() -> bool:
    arguments = getattr(sys, "argv", None) or [""]  # an embedded interpreter may have none
    program = arguments[0]
    if program == "-m":  # Python is still looking for the module
        module = sys.orig_argv[-len(arguments)].removeprefix("-m")
        return module == __package__ or module.startswith(f"{__package__}.")
    main = os.path.join(os.path.dirname(__file__), "__main__.py")
    return program == main or os.path.splitext(os.path.basename(program))[0] == "t2t-fast"


@contextlib.contextmanager
def _interrupt_exits() -> Iterator[None]:
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _exit_130)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit_130(*args: Any) -> None:
    os._exit(130)  # an exception would be raised inside an arbitrary import, which may swallow it
