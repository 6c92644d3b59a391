"""Show a throughput result on the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from t2t_fast.bench.tables import agreement, quantile
from t2t_fast.bench.terminal import SIMPLE_HEAD, Table, wide_console

WIDTH = 120  # of the table
_SAME = ("mode", "precision", "batch_size", "img_size")


def show(result: dict[str, Any]) -> None:
    """Print the table, an explanation of its columns, and the failures."""
    console = wide_console(WIDTH)
    rows = result["rows"]
    if result.get("grid"):  # the slowest cell first
        rows = sorted(rows, key=lambda row: math.inf if row["speed"] is None else row["speed"])
    varied = [name for name in _SAME if len({row[name] for row in rows}) > 1]
    latency = any(row["batch_size"] == 1 for row in rows) and not result.get("grid")
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("model", no_wrap=True)
    table.add_column("variant", no_wrap=True)
    for name in varied:
        table.add_column({"batch_size": "batch", "img_size": "pixels"}.get(name, name))
    headings = ["params\n(M)", "MACs\n(G)", "images/s", "ms/batch", *(["p90, p99\n(ms)"] * latency)]
    for heading in (*headings, "speed", "of a\nproduct", "error", "top-1"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if result.get("grid") and row["variant"] == "reference":
            continue
        table.add_row(row["model"], row["variant"] or "-", *(str(row[name]) for name in varied), *_cells(row, latency))
    console.print(table)
    console.print()
    console.print(_conditions(result, varied))
    console.print(
        "images/s: median of the rounds ± half the interquartile range. speed: relative to the model's reference, "
        "or else to the first one; median of the rounds. MACs include the matmuls of attention."
    )
    rates = ", ".join(f"{rate / 1e12:.2f} in {name}" for name, rate in result["operations_per_second"].items())
    console.print(
        "of a matmul: the model's arithmetic per second over that of one large matmul on this machine, "
        f"{rates} (10^12 operations per second)."
    )
    limits = sorted({row["tolerance"] for row in rows if row["tolerance"] is not None})
    if limits:
        console.print(
            "error: relative norm of the difference from the reference in float64, same random weights and images, of "
            f"the logits (of the gradients in training); accepted up to {', '.join(f'{x:.0e}' for x in limits)}."
        )
    for row in rows:
        if row["status"] == "wrong":
            limit = row["tolerance"]
            found = "not finite" if limit is None else f"error {_error(row)}, accepted up to {limit:.0e}"
            if limit is not None and row["error"] is not None and row["error"] <= limit:
                found += ", but one of the gradients is wrong"
            console.print(
                f"WRONG: {row['model']} {row['variant'] or ''}, {row['mode']} in {row['precision']}: {found}; "
                "its speed was not measured.",
                style="bold red",
            )
        elif row["status"] != "ok":
            console.print(f"{row['model']} {row['variant'] or ''}: {row['status']}")
        if row.get("agreement") is not None:
            console.print(
                f"{row['model']} {row['variant']}: {agreement(row)} that did not calibrate it; its logits are held to "
                "no tolerance."
            )


def _conditions(result: dict[str, Any], varied: Sequence[str]) -> str:
    row, env = result["rows"][0], result["environment"]
    threads = f", {env['cpu']['torch_threads']} threads" if result["device"] == "cpu" else ""
    same = {
        "mode": row["mode"],
        "precision": row["precision"],
        "batch_size": f"batches of {row['batch_size']}",
        "img_size": f"{row['img_size']} x {row['img_size']}",
    }
    told = ", ".join(text for name, text in same.items() if name not in varied)
    rounds = max(len(row["seconds"]) for row in result["rows"])
    return (
        f"{result['hardware']}{threads}, torch {env['torch']}, {told}, {result['images']}; rounds: {rounds}, "
        f"{result['total_seconds']:.0f} s in all."
    )


def _cells(row: dict[str, Any], latency: bool) -> list[str]:
    macs = row["macs"] / 1e9
    cells = [f"{row['params'] / 1e6:.1f}", f"{macs:.{1 if macs >= 1 else 2}f}"]
    if row["seconds"]:
        digits = 0 if row["images_per_second"] >= 1000 else 1 if row["images_per_second"] >= 10 else 2
        spread = "" if row["spread"] is None else f" ± {row['spread']:.{digits}f}"
        cells += [f"{row['images_per_second']:.{digits}f}{spread}", f"{row['ms_per_batch']:.1f}"]
        cells += [", ".join(f"{1000 * quantile(row['seconds'], q):.1f}" for q in (90, 99))] * latency
        cells.append("-" if row["speed"] is None else f"{row['speed']:.2f}x")
        cells.append("-" if row["of_product"] is None else f"{row['of_product']:.0%}")
    else:
        short = row["status"].partition(":")[0]
        cells += [short, "-", *(["-"] * latency), "-", "-"]
    if row["error"] is None and row["status"] != "wrong":
        return [*cells, "-", "-"]
    return [*cells, _error(row), "-" if row["top1"] is None else f"{row['top1']:.0%}"]


def _error(row: dict[str, Any]) -> str:
    return "nan" if row["error"] is None else f"{row['error']:.1e}"
