"""What changed between two result files of throughput.py: the ratio of every row's speeds, with a confidence interval.

    python benchmarks/compare.py before.json after.json
    python benchmarks/compare.py results/main.json results/local/mine.json --fail-below 0.97

Rows are matched by model, variant, mode, precision, batch and image size. The interval is that of the ratio of median
speeds, 95%, from 10000 resamplings of the raw times with a fixed seed; a difference is real where it leaves out 1.
Within one run rounds lie close together, so the interval knows the noise of the runs compared, not that of machines on
other days.

exit status: 0, 1 if a ratio is really below --fail-below, 2 if the files cannot be compared
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _common import OneLineParser, UsageError, positive_seconds, read_json
from rich.console import Console
from rich.table import Table

RESAMPLINGS = 10_000
Key = tuple[Any, ...]


def rows_by_key(result: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    """The rows that were timed, by what tells them apart; older files have a backend, and what all rows share once."""
    found: dict[Key, dict[str, Any]] = {}
    for row in result["rows"]:
        if row.get("seconds"):
            names = ("batch_size", "img_size")
            sizes = tuple(row.get(name, result.get(name)) for name in names)
            precision = row.get("precision", result.get("dtype"))
            variant = row.get("variant", row.get("backend"))
            found[(row["model"], variant, row.get("mode", "inference"), precision, *sizes)] = row
    return found


def interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """Ratio of the speeds, after over before, and the ends of its 95% interval: all by medians of the times."""
    generator = np.random.default_rng(0)

    def medians(seconds: Sequence[float]) -> np.ndarray:
        picked = generator.integers(len(seconds), size=(RESAMPLINGS, len(seconds)))
        return np.median(np.asarray(seconds)[picked], axis=1)

    low, high = np.quantile(medians(before) / medians(after), [0.025, 0.975])
    return float(np.median(before) / np.median(after)), float(low), float(high)


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each row that both have.

    Raises:
        UsageError: The files are of different hardware or benchmarks, or have nothing in common.
    """
    for name in ("benchmark", "device", "hardware"):
        if before.get(name) != after.get(name):
            raise UsageError(f"the files are of different {name}: {before.get(name)!r} and {after.get(name)!r}")
    old, new = rows_by_key(before), rows_by_key(after)
    rows = []
    for key in (key for key in old if key in new):
        ratio, low, high = interval(old[key]["seconds"], new[key]["seconds"])
        rows.append({"key": key, "ratio": ratio, "low": low, "high": high, "before": old[key], "after": new[key]})
    if not rows:
        raise UsageError("the files have no timed row in common")
    return rows


def verdict(row: dict[str, Any]) -> str:
    """In a word."""
    return "faster" if row["low"] > 1 else "slower" if row["high"] < 1 else "same"


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and return the exit status."""
    parser = OneLineParser(prog="compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, metavar="A", help="result file")
    parser.add_argument("after", type=Path, metavar="B", help="result file to compare with it")
    parser.add_argument("--fail-below", type=positive_seconds, metavar="RATIO", help="exit status 1 if B is slower")
    options = parser.parse_args(argv)
    try:
        before, after = read_json("A", options.before), read_json("B", options.after)
        rows = compare(before, after)
    except UsageError as error:
        parser.error(str(error))
    table = Table("model", "variant", "mode", "precision", "batch", "pixels", "before", "after", "B / A", "95%", "")
    for row in rows:
        names = ("-" if part is None else str(part) for part in row["key"])
        speeds = (f"{row[when]['images_per_second']:.1f}" for when in ("before", "after"))
        spread = f"{row['low']:.3f} to {row['high']:.3f}"
        table.add_row(*names, *speeds, f"{row['ratio']:.3f}", spread, verdict(row))
    console = Console(highlight=False)
    console.width = max(console.width, 130)
    console.print(table)
    for name, result in (("A", before), ("B", after)):
        env = result["environment"]
        print(f"{name}: {result['date']}, torch {env['torch']}, commit {env.get('git')}, {result['hardware']}")
    worse = [row for row in rows if options.fail_below and row["high"] < options.fail_below]
    for row in worse:
        print(f"SLOWER: {' '.join(map(str, row['key']))}: at most {row['high']:.3f}, not {options.fail_below}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
