"""The command line: one module per command, each with ``add_parser(subparsers)`` and ``run(args) -> exit code``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .. import BackendUnavailable, CheckpointError, __version__
from . import bench, convert, env, export, list, macs, predict
from .common import PROG, UsageError

COMMANDS = (predict, macs, list, convert, export, bench, env)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (``sys.argv[1:]`` for None).

    Returns:
        The exit code: 0, or what the command says; 2, with one line on stderr, for what only the user can mend; 130
        after Ctrl-C. Other errors keep their traceback.
    """
    parser = argparse.ArgumentParser(PROG, description="T2T-ViT, made fast. See COMMAND --help for each command.")
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    args = parser.parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except (UsageError, CheckpointError, BackendUnavailable) as error:
        return _report(str(error))
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.filename is None:
            raise
        return _report(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        return 130


def _report(message: str) -> int:
    print(f"{PROG}: error:", " ".join(message.split()), file=sys.stderr)
    return 2
