"""The tables of docs/kernels.md, from benchmarks/resources.json alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from t2t_fast.bench.bounds import CHIPS
from t2t_fast.bench.launches import MODULE
from t2t_fast.bench.tables import Row, markdown

KIND = "bfloat16"
IMAGES = "128"


def bounds(table: dict[str, Any]) -> str:
    """A row per kernel and use: floor, bound and what says how far above it a launch will lie, on the H100 and the
    A100."""
    by_name: dict[tuple[str, str], dict[int, Row]] = {}
    for row in _rows(table):
        by_name.setdefault((row["kernel"], row["use"]), {})[row["arch"]] = row
    headings = ["kernel", "use", "floor", "bound", "programs", "waves", "in the loop", "A100: floor", "bound"]
    body = []
    for (kernel, use), on in by_name.items():
        hopper, ampere = (on[arch]["images"][IMAGES] for arch in (90, 80))
        loops = " + ".join(f"{sum(loop.values())}" for loop in on[90]["loops"]) or "–"
        held = f"{on[90]['resident']} of {on[90]['num_warps']} warps"
        cells = [f"{hopper['floor']:.0f}", f"{hopper['bound']:.0f}", held, f"{hopper['waves']:.2f}", loops]
        body.append([kernel, use, *cells, f"{ampere['floor']:.0f}", f"{ampere['bound']:.0f}"])
    return markdown(headings, body)


def module(table: dict[str, Any]) -> str:
    """The sums over the launches of the tokens-to-token module of T2T-ViT-14."""
    rows = {(row["arch"], row["kernel"], row["use"]): row["images"] for row in _rows(table)}
    body = []
    for mode, launches in MODULE.items():
        for arch, chip in CHIPS.items():
            found = [rows[arch, *launch][IMAGES] for launch in launches]
            times = ([row["floor"] for row in found], [row["bound"] for row in found], [larger(row) for row in found])
            body.append([mode, chip.name, str(len(launches)), *(f"{sum(column) / 1000:.2f}" for column in times)])
    return markdown(["", "chip", "launches", "sum of floors, ms", "of bounds", "of the larger of both"], body)


def larger(row: Row) -> float:
    """What a launch takes at least, in µs."""
    return max(row["floor"], row["bound"])


def fullness(table: dict[str, Any]) -> str:
    """How full the waves of each kernel are, by the number of images."""
    body, of_module = [], {launch for launches in MODULE.values() for launch in launches}
    for row in _rows(table):
        if row["arch"] == 90 and (row["kernel"], row["use"]) in of_module:
            shares = (_share(at["waves"]) for at in row["images"].values())
            body.append([row["kernel"], row["use"], *(f"{share:.2f}" for share in shares)])
    images = next(iter(_rows(table)))["images"]
    return markdown(["kernel", "use", *images], body)


def _share(waves: float) -> float:
    """Of the places of all waves, those that are taken."""
    return waves / -(-waves // 1)


def _rows(table: dict[str, Any]) -> Iterable[Row]:
    return [row for row in table["rows"] if row["kind"] == KIND and row["arch"] in CHIPS]


# By the names of the generated blocks.
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"bounds": bounds, "module": module, "fullness": fullness}
