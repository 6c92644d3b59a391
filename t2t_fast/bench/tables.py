"""Markdown tables of result files, of every benchmark and of earlier formats."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from t2t_fast.bench.common import OP_VARIANTS

Result = dict[str, Any]
Row = dict[str, Any]


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text."""
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def normalised(result: Result) -> list[Row]:
    """The rows of a throughput file in today's format; older ones have "backend", and values outside of rows."""
    shared = {"mode": "inference", "precision": result.get("dtype"), "status": "ok"}
    shared |= {name: result.get(name) for name in ("batch_size", "img_size")}
    return [{**shared, **row, "variant": row.get("variant", row.get("backend"))} for row in result["rows"]]


def rate(value: float) -> str:
    """Images per second to three digits."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def pixels(size: Iterable[int]) -> str:
    """Height and width as ``224x320``; the side of a square once."""
    return "x".join(map(str, dict.fromkeys(size)))


def megabytes(value: float) -> str:
    return f"{value / 1e6:.0f}"


def grid(result: Result) -> str:
    """One table for all image and batch sizes: how many times as fast as the reference."""
    rows = [row for row in normalised(result) if row["variant"] not in (None, "reference")]
    sizes = list(dict.fromkeys(row["img_size"] for row in rows))
    batches = list(dict.fromkeys(row["batch_size"] for row in rows))
    lines: dict[tuple[Any, ...], dict[tuple[int, int], str]] = {}
    for row in rows:
        cell = row["status"] if row.get("speed") is None else f"{row['speed']:.2f}"
        line = lines.setdefault((row["model"], row["mode"], row["precision"], row["variant"]), {})
        line[row["img_size"], row["batch_size"]] = cell
    body = [[*key, *(" / ".join(line.get((s, b), "") for b in batches) for s in sizes)] for key, line in lines.items()]
    title = f"Times as fast as the reference, batches of {' / '.join(map(str, batches))}"
    timed = [row for row in rows if row.get("speed") is not None]
    if timed:
        slowest = min(timed, key=lambda row: row["speed"])
        where = ", ".join(str(slowest[name]) for name in ("model", "variant", "mode"))
        title += f"; the slowest cell is {slowest['speed']:.2f} ({where}, {slowest['img_size']} px, "
        title += f"batch {slowest['batch_size']})"
    headings = ["model", "mode", "precision", "variant", *(f"{size} px" for size in sizes)]
    return f"{title}:\n\n{markdown(headings, body)}"


def throughput(result: Result) -> str:
    """A table for each mode, precision, batch and image size."""
    if result.get("grid"):
        return grid(result)
    kinds: dict[tuple[Any, ...], list[Row]] = {}
    for row in normalised(result):
        kinds.setdefault((row["mode"], row["precision"], row["batch_size"], row["img_size"]), []).append(row)
    parts = []
    for (mode, precision, batch, size), rows in kinds.items():
        latency, related = batch == 1, any(row.get("of_product") for row in rows)
        headings = ["model", "variant", "MACs (G)", "images/s", "speed", *(["p50, p90, p99 (ms)"] * latency)]
        headings += [*(["of a matmul"] * related), "error"]
        body = []
        for row in rows:
            cells = [row["model"], row["variant"] or "timm", f"{row['macs'] / 1e9:.1f}"]
            if row["seconds"]:
                spread = "" if row["spread"] is None else f" ± {100 * row['spread'] / row['images_per_second']:.1f}%"
                speed = "" if row["speed"] is None else f"{row['speed']:.2f}x"
                cells += [f"{rate(row['images_per_second'])}{spread}", speed]
                cells += [", ".join(f"{1000 * quantile(row['seconds'], q):.1f}" for q in (50, 90, 99))] * latency
                if related:
                    cells.append("" if row["of_product"] is None else f"{row['of_product']:.0%}")
            else:
                cells += [row["status"], "", *([""] * (latency + related))]
            body.append([*cells, _error(row)])
        images = "batches of 1" if latency else f"batches of {batch}"
        parts.append(f"{mode.capitalize()}, {precision}, {images}, {size} px:\n\n{markdown(headings, body)}")
    return "\n\n".join(parts)


def _error(row: Row) -> str:
    """The logits' error, and int8's agreement, which stands for it."""
    error = "" if row["error"] is None else f"{row['error']:.0e}"
    if row.get("agreement") is None:
        return error
    return f"{error}, {agreement(row)}"


def agreement(row: Row) -> str:
    """What an int8 row is judged by."""
    return f"top-1 as in float32 for {row['agreement']:.0%} of {row['held_out']} images"


def quantile(values: Sequence[float], percent: int) -> float:
    """The smallest of ``values`` that at least ``percent`` % of them do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def tokens_to_token(result: Result) -> str:
    body = [
        [r["model"], r["part"], *(f"{1e3 * r['median_s'][b]:.0f}" for b in ("reference", "auto")), f"{r['ratio']:.2f}x"]
        for r in result["rows"]
    ]
    title = f"Tokens-to-token module, {result['dtype']}, {result['batch_size']} images of {result['img_size']} px:"
    return f"{title}\n\n{markdown(['model', 'part', 'reference (ms)', 'auto (ms)', 'ratio'], body)}"


def se_mlp(result: Result) -> str:
    body = []
    for row in result["rows"]:
        shape = "x".join(map(str, row["shape"])) if isinstance(row["shape"], list) else str(row["shape"])
        ratios = [f"{row[name]:.2f}x" for name in ("to_reference", "to_aten")]
        body.append([shape, row["dtype"], row["part"], row["allocator"], *ratios])
    headings = ["images x tokens x channels, hidden", "dtype", "part", "allocator", "over reference", "over aten"]
    return f"Squeeze-and-excitation, the extension:\n\n{markdown(headings, body)}"


def memory(result: Result) -> str:
    names = ("inference", "forward", "kept", "backward", "update", "largest_inference", "largest_training")
    body = [
        [r["model"], r["variant"], *(megabytes(r[name]) if name in r else r["status"] for name in names)]
        for r in result["rows"]
    ]
    first = result["rows"][0]
    title = f"Memory (MB), {first['precision']}, {first['batch_size']} images of {first['img_size']} px:"
    headings = ["model", "variant", "inference", "forward", "kept for backward", "backward", "update"]
    return f"{title}\n\n{markdown([*headings, 'largest tensor, inference', 'training'], body)}"


def macs(result: Result) -> str:
    def paper(row: Row, name: str) -> str:
        value = row[f"published_{name}"]
        return "" if value is None else f"{value:.1f}"

    body, sizes = [], list(dict.fromkeys(pixels(row["image_size"]) for row in result["rows"]))
    for row in result["rows"]:
        deviation = row["macs_deviation_percent"]
        told = (
            ""
            if deviation is None
            else f"{deviation:+.1f}%" + (" (rounds to it)" if row["rounds_to_published"] else "")
        )
        cells = [f"{row['params'] / 1e6:.1f}", paper(row, "params_m"), f"{row['macs'] / 1e9:.2f}", paper(row, "macs_g")]
        name = row["name"] if len(sizes) == 1 else f"{row['name']}, {pixels(row['image_size'])} px"
        body.append([name, *cells, told, f"{row['activations'] / 1e6:.1f}"])
    headings = ["model", "params (M)", "paper", "MACs (G)", "paper", "deviation", "activations (M)"]
    return f"Work per image of {' and '.join(sizes)} px:\n\n{markdown(headings, body)}"


def kernels(result: Result) -> str:
    timed = {row["variant"] for row in result["rows"] if "forward_s" in row}
    variants = [variant for variant in OP_VARIANTS if variant in timed]
    body = []
    for name, work in result["work"].items():
        rows = {r["variant"]: r for r in result["rows"] if f"{r['op']}, {r['use']}" == name}
        for part in ("forward", "training"):
            floor = work[part]["floor_s"]
            cells = [
                f"{rows[v][f'{part}_s'] / floor:.1f}" if v in rows and f"{part}_s" in rows[v] else "" for v in variants
            ]
            body.append([name, part, f"{1e3 * floor:.2f}", *cells])
    title = f"Ops, times their floor, {result['dtype']}, batches of {result['batch_size']}:"
    return f"{title}\n\n{markdown(['op', 'part', 'floor (ms)', *variants], body)}"


def tuning(result: Result) -> str:
    body = []
    for row in result["rows"]:
        cells = [row["table"], row["kind"], str(row["tried"]), str(len(row["failed"]))]
        if row["best"] is None:
            body.append([*cells, row["status"], "", ""])
            continue
        config = row["candidates"][row["best_index"]]["config"]
        blocks = ", ".join(f"{name.removeprefix('BLOCK_').lower()} {size}" for name, size in config["blocks"].items())
        body.append([*cells, f"{row['best']:.3f}", blocks, f"{config['num_warps']}, {config['num_stages']}"])
    headings = ["table", "arithmetic", "tried", "failed", "best over shipped", "blocks", "warps, stages"]
    return f"Block sizes tried, time of the best over that of the shipped ones:\n\n{markdown(headings, body)}"


def overhead(result: Result) -> str:
    body = [
        [r["mode"], r["block"], f"{r['microseconds']:.1f}", f"{r['times_timm']:.2f}x", str(r["calls"])]
        for r in result["rows"]
    ]
    title = (
        f"Python time of a block, {result['tokens']} tokens of {result['channels']} channels, {result['precision']}:"
    )
    return f"{title}\n\n{markdown(['mode', 'block', 'µs', 'of timm', 'calls'], body)}"


KINDS = {
    "throughput": throughput,
    "tokens_to_token": tokens_to_token,
    "se_mlp": se_mlp,
    "memory": memory,
    "macs": macs,
    "kernels": kernels,
    "tuning": tuning,
    "overhead": overhead,
}
