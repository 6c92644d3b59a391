"""The command line: one module per command, each with ``add_parser(subparsers)`` and ``run(args) -> exit code``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..startup import importing

with importing():
    from .. import BackendUnavailable, CheckpointError, __version__
    from ..usage import OneLineParser, UsageError, printable
    from . import bench, convert, env, export, list, macs, predict
    from .common import is_out_of_memory
    from .streams import PROG, STANDARD_OUTPUT, flush_output, log_records_shown, say, usable_streams

COMMANDS = (predict, macs, list, convert, export, bench, env)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (``sys.argv[1:]`` for None).

    Returns:
        The exit code: that of the command, 0 on success; 2, with one line on stderr, for errors that the user can fix;
        130 after Ctrl-C; 141 if the reader of a pipe has closed it. Other errors keep their traceback.

    Raises:
        SystemExit: After ``--help`` and ``--version``; with code 2 for arguments that the parser refuses.
    """
    with usable_streams(), log_records_shown():
        try:
            try:
                return _run(sys.argv[1:] if argv is None else argv)
            finally:
                flush_output()  # also after --help, which raises SystemExit
        except (UsageError, CheckpointError, BackendUnavailable) as error:
            return _report(str(error))
        except OSError as error:
            if isinstance(error, BrokenPipeError) and error.filename == STANDARD_OUTPUT:
                return 141  # the reader has closed the pipe, as `head` does
            if error.filename is None:
                raise
            return _report(f"{printable(str(error.filename)) or repr('')}: {error.strerror}")
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return _report("out of memory; a smaller --img-size, --batch-size or model needs less")
        except KeyboardInterrupt:
            return 130


def _run(argv: Sequence[str]) -> int:
    for argument in argv:
        if "\0" in argument:
            raise UsageError(f"the argument {argument!r} contains a NUL character")
    args = make_parser().parse_args(argv)
    code: int = args.run(args)
    return code


def make_parser() -> OneLineParser:
    """The parser of the whole command line."""
    parser = OneLineParser(PROG, description="T2T-ViT, made fast. See COMMAND --help for each command.")
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def _report(message: str) -> int:
    say(f"error: {message}")
    return 2
