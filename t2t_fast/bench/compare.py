"""Compare two result files of throughput.py: the ratio of each row's speeds, with a confidence interval.

    python benchmarks/compare.py before.json after.json
    python benchmarks/compare.py results/main.json results/local/mine.json --fail-below 0.97

Rows are matched by model, variant, mode, precision, batch and image size. The 95% interval of the ratio of median
speeds comes from 10000 resamplings of the raw times with a fixed seed; if it excludes 1, the runs differ. Rows of less
than 5 rounds get no verdict. The interval covers the noise within the two runs, not differences between days. Rows
with a speed in A but not in B are listed.

exit status: 0; 1 if the whole interval of a ratio is below --fail-below, or a row of A is wrong, fails or runs out of
memory in B; 2 if the files cannot be compared
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t2t_fast.bench.common import positive_number, read_json
from t2t_fast.bench.tables import Result, Row, normalised
from t2t_fast.bench.terminal import Table, wide_console
from t2t_fast.usage import OneLineParser, UsageError

RESAMPLINGS = 10_000
LEAST = 5  # rounds for a verdict: with fewer, equal speeds often seem to differ
BROKEN = ("wrong", "failed", "out of memory")
Key = tuple[Any, ...]


def rows_by_key(result: Result) -> dict[Key, Row]:
    """The rows by their model, variant and conditions."""
    names = ("model", "variant", "mode", "precision", "batch_size", "img_size")
    return {tuple(row[name] for name in names): row for row in normalised(result)}


def interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """Ratio of the median speeds, after over before, and both ends of its 95% interval."""
    generator = np.random.default_rng(0)

    def medians(seconds: Sequence[float]) -> np.ndarray:
        picked = generator.integers(len(seconds), size=(RESAMPLINGS, len(seconds)))
        return np.median(np.asarray(seconds)[picked], axis=1)

    low, high = np.quantile(medians(before) / medians(after), [0.025, 0.975])
    return float(np.median(before) / np.median(after)), float(low), float(high)


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each timed row of ``before``; without a ratio if ``after`` did not time it.

    Raises:
        UsageError: The files are of different hardware or benchmarks, or have no row in common.
    """
    try:
        for name in ("benchmark", "device", "hardware", "with_loader", "threads"):
            a, b = (_condition(result, name) for result in (before, after))
            if a != b:
                raise UsageError(f"the files are of different {name}: {a!r} and {b!r}")
        old, new = rows_by_key(before), rows_by_key(after)
        rows = []
        for key in (key for key in old if _timed(old[key])):
            row: dict[str, Any] = {"key": key, "before": old[key], "after": new.get(key, {"status": "missing"})}
            if _timed(row["after"]):
                ratio, low, high = interval(old[key]["seconds"], new[key]["seconds"])
                row |= {"ratio": ratio, "low": low, "high": high}
            rows.append(row)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"a row is none of throughput.py's ({error!r}); pass files that it has written") from error
    if not any("ratio" in row or _broken(row) for row in rows):
        raise UsageError("the files have no timed row in common")
    return rows


def _timed(row: dict[str, Any]) -> bool:
    """Whether the row has times that count: those of a row that failed later do not."""
    if not row.get("seconds") or row.get("status", "ok").startswith(BROKEN):
        return False
    if not (row["images_per_second"] > 0 and min(row["seconds"]) > 0):
        raise ValueError(f"times of {row['model']}")
    return True


def _broken(row: dict[str, Any]) -> bool:
    return str(row["after"].get("status")).startswith(BROKEN)


def _condition(result: dict[str, Any], name: str) -> Any:
    if name == "with_loader":
        return bool(result.get(name))
    if name == "threads":
        cpu = (result.get("environment") or {}).get("cpu") or {}
        return cpu.get("torch_threads") if result.get("device") == "cpu" else None
    return result.get(name)


def verdict(row: dict[str, Any]) -> str:
    """faster, slower, same, too few rounds, or LOST with the reason."""
    if "ratio" not in row:
        return f"LOST: {row['after'].get('status')}"
    if min(len(row[when]["seconds"]) for when in ("before", "after")) < LEAST:
        return "too few rounds"
    return "faster" if row["low"] > 1 else "slower" if row["high"] < 1 else "same"


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and return the exit status."""
    parser = OneLineParser(prog="compare.py", description=__doc__)
    parser.add_argument("before", type=Path, metavar="A", help="result file")
    parser.add_argument("after", type=Path, metavar="B", help="result file to compare with it")
    parser.add_argument("--fail-below", type=positive_number, metavar="RATIO", help="exit status 1 if B is slower")
    options = parser.parse_args(argv)
    try:
        before, after = read_json("A", options.before), read_json("B", options.after)
        rows = compare(before, after)
    except UsageError as error:
        parser.error(str(error))
    table = Table("model", "variant", "mode", "precision", "batch", "pixels", "before", "after", "B / A", "95%", "")
    for row in rows:
        names = ("-" if part is None else str(part) for part in row["key"])
        speeds = [_speed(row[when]) for when in ("before", "after")]
        found = [f"{row['ratio']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}"] if "ratio" in row else ["-", "-"]
        table.add_row(*names, *speeds, *found, verdict(row))
    wide_console(130).print(table)
    for name, result in (("A", before), ("B", after)):
        env = result.get("environment") or {}
        told = f"torch {env.get('torch')}, commit {env.get('git')}, {result.get('hardware')}"
        print(f"{name}: {result.get('date')}, {told}")
    failed = False
    for row in rows:
        name, said = " ".join(map(str, row["key"])), verdict(row)
        if said.startswith("LOST"):
            print(f"{name}: {said}")
            failed |= _broken(row)
        elif options.fail_below and said != "too few rounds" and row["high"] < options.fail_below:
            print(f"SLOWER: {name}: at most {row['high']:.3f}, not {options.fail_below}")
            failed = True
    return 1 if failed else 0


def _speed(row: dict[str, Any]) -> str:
    return f"{row['images_per_second']:.1f}" if row.get("images_per_second") else "-"


if __name__ == "__main__":
    sys.exit(main())
