"""Shared by the benchmarks: argument types, paths of results, and reading and writing of result files."""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from t2t_fast import files
from t2t_fast.usage import UsageError

OUTPUT_HELP = "file, or a folder for it; default: benchmarks/results/local of a checkout, else this folder"
# Variants of the kernel benchmark; auto is for a whole module.
OP_VARIANTS = ("reference", "reference, compiled", "aten", "triton", "native", "auto")
_ROOT = Path(__file__).resolve().parents[2]


def checkout() -> Path:
    """The folder of the project's checkout that this package is run from.

    Raises:
        UsageError: The package does not run from a checkout.
    """
    if not (_ROOT / "benchmarks" / "results").is_dir():
        raise UsageError(f"this needs a checkout of the project, but t2t_fast is in {_ROOT}; run it in the checkout")
    return _ROOT


def default_folder() -> Path:
    """The default folder of results: one that git ignores in a checkout, else the working directory."""
    try:
        return checkout() / "benchmarks" / "results" / "local"  # committed results are in the folder above
    except UsageError:
        return Path.cwd()


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted: a whole number of at least 1")
    return value


def positive_number(text: str) -> float:
    """An argparse type: a positive, finite number."""
    return _number(text, math.inf, "a number above 0")


def positive_seconds(text: str) -> float:
    """An argparse type: a positive, finite number of seconds."""
    return _number(text, math.inf, "a number of seconds above 0")


def fraction(text: str) -> float:
    """An argparse type: a number above 0, at most 1."""
    return _number(text, math.nextafter(1, 2), "a number above 0, at most 1")


def _number(text: str, end: float, accepted: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < end:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted: {accepted}")
    return value


def result_path(output: Path | None, device: str, env: Mapping[str, Any], date: datetime) -> Path:
    """The path of a result: ``output``, or a file in it or the default folder, named by device, versions and date.

    The folder is made, and tested by writing, before minutes of measuring.

    Raises:
        UsageError: The folder cannot be written to.
    """
    versions = "_".join(f"{name}{str(env[name]).partition('+')[0]}" for name in ("torch", "triton") if env[name])
    name = f"{slug(device)}_{versions}_{date:%Y%m%d-%H%M%S}.json"
    if output is not None and output.exists() and not (output.is_file() or output.is_dir()):
        return output  # a device or FIFO is written to directly
    is_folder = output is not None and (output.is_dir() or not output.suffix)  # a name without a suffix is a folder
    path = default_folder() / name if output is None else output / name if is_folder else output
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UsageError(
            f"--output: {path.parent} cannot be written to ({error.strerror}); pass a file in a folder that can"
        ) from error
    return path


def new_result(benchmark: str, date: datetime, command: str, env: Mapping[str, Any], **content: Any) -> dict[str, Any]:
    """The content of a result file without rows; ``content`` are further entries."""
    start = {"benchmark": benchmark, "date": date.isoformat(timespec="seconds"), "command": command}
    return {**start, **content, "environment": env, "rows": []}


def command_line(script: str, argv: Sequence[str], left_out: Sequence[str] = ("--output",)) -> str:
    """The command that reproduces a result, without the arguments ``left_out``."""
    kept, arguments = ["python", f"benchmarks/{script}.py"], iter(argv)
    for argument in arguments:
        if argument in left_out:
            next(arguments, None)
        elif argument.partition("=")[0] not in left_out:
            kept.append(argument)
    return shlex.join(kept)


def slug(text: str) -> str:
    """``text`` in lower case, with single hyphens for everything but letters, digits and dots."""
    return re.sub(r"[^a-z0-9.]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """:func:`write_text` of ``content`` as JSON."""
    write_text(path, files.json_text(content))


def write_text(path: Path, text: str) -> None:
    """:func:`write_bytes` of ``text`` in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file completely or not at all, a device or FIFO directly.

    Raises:
        UsageError: It cannot be written.
    """
    try:
        files.write_bytes(path, data)
    except OSError as error:
        raise UsageError(f"{path} could not be written ({error.strerror}); pass another path") from error


def read_json(option: str, path: Path) -> dict[str, Any]:
    """A result file's content.

    Raises:
        UsageError: The file that ``option`` names is not a result file.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{option}: {str(path)!r} cannot be read ({error.strerror}); pass a result file") from error
    except ValueError as error:
        raise UsageError(f"{option}: {str(path)!r} is no JSON; pass a result file of these benchmarks") from error
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise UsageError(f"{option}: {str(path)!r} holds no rows; pass a result file of these benchmarks")
    return content
