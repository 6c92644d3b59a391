"""Plots of results, as reproducible SVG and PNG files. Without matplotlib nothing is drawn."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from t2t_fast.bench.common import write_bytes

Row = dict[str, Any]


@contextlib.contextmanager
def _figure(path: Path, written: list[Path], **labels: Any) -> Iterator[Any]:
    """A context with axes; afterwards the figure is saved beside ``path`` and its files are added to ``written``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with matplotlib.rc_context({"svg.hashsalt": "t2t_fast", "svg.fonttype": "none"}):
        figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
        yield axes
        axes.set(**labels)
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                _plain_ticks(axis)
        axes.grid(which="both", alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
        for suffix, metadata in ((".svg", {"Date": None}), (".png", {"Software": None})):
            picture = io.BytesIO()
            figure.savefig(picture, format=suffix[1:], metadata=metadata, dpi=150)
            write_bytes(path.with_suffix(suffix), picture.getvalue())
            written.append(path.with_suffix(suffix))
        plt.close(figure)


def _plain_ticks(axis: Any) -> None:
    """Label a logarithmic axis 2, 5, 10k instead of by powers of ten; more densely if its range is small."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 20 * low else (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
    axis.set_major_formatter(EngFormatter(sep=""))
    axis.set_minor_locator(NullLocator())


def _has_matplotlib() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def _scatter(axes: Any, rows: Sequence[Row], x: dict[str, float]) -> None:
    """Images per second over ``x`` by model; a colour per variant; T2T-ViTs have their names above, others below."""
    for variant in dict.fromkeys(row["variant"] or "timm" for row in rows):
        mine = [row for row in rows if (row["variant"] or "timm") == variant]
        marker = "s" if variant == "timm" else "o"
        axes.scatter(
            [x[r["model"]] for r in mine], [r["images_per_second"] for r in mine], label=variant, marker=marker
        )
    axes.margins(x=0.2)  # room for the names
    names: dict[tuple[float, float, bool], str] = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        top = max(row["images_per_second"] for row in rows if row["model"] == model)
        place, name = (x[model], top, model.startswith("t2t")), model.replace("_patch16_224", "")
        near = (p for p in names if math.dist(map(math.log, p[:2]), map(math.log, place[:2])) < 0.05)
        place = next((p for p in near if p[2] == place[2]), place)
        names[place] = f"{names[place]}, {name}" if place in names else name
    for (left, top, ours), name in names.items():
        offset, side = ((4, 4), "left") if ours else ((-5, -9), "right")
        axes.annotate(name, (left, top), textcoords="offset points", xytext=offset, ha=side, fontsize="x-small")


def _timed(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.get("seconds")]


def plot_macs(rows: Sequence[Row], title: str, path: Path) -> list[Path]:
    """Images per second against multiply-accumulates; the files written."""
    rows, written = _timed(rows), list[Path]()
    if rows and _has_matplotlib():
        x = {row["model"]: row["macs"] for row in rows}
        labels = {"xlabel": "multiply-accumulates of an image", "ylabel": "images per second", "title": title}
        with _figure(path, written, xscale="log", yscale="log", **labels) as axes:
            _scatter(axes, rows, x)
    return written


def with_top1(rows: Sequence[Row], top1: dict[str, float]) -> list[Row]:
    """The timed rows of models with a published top-1; empty for less than three models."""
    rows = [row for row in _timed(rows) if row["model"] in top1]
    return rows if len({row["model"] for row in rows}) >= 3 else []


def plot_top1(rows: Sequence[Row], top1: dict[str, float], title: str, path: Path) -> list[Path]:
    """Images per second against the paper's top-1, for the rows of :func:`with_top1`."""
    rows, written = with_top1(rows, top1), list[Path]()
    if rows and _has_matplotlib():
        labels = {"xlabel": "top-1 on ImageNet, as published (%)", "ylabel": "images per second", "title": title}
        with _figure(path, written, yscale="log", **labels) as axes:
            _scatter(axes, rows, top1)
    return written


def by_batch(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """Images per second by batch size, of each model and variant with at least three batch sizes."""
    lines: dict[str, dict[int, float]] = {}
    for row in _timed(rows):
        name = f"{row['model']} {row['variant'] or ''}".strip()
        lines.setdefault(name, {})[row["batch_size"]] = row["images_per_second"]
    return {name: line for name, line in lines.items() if len(line) >= 3}


def plot_batches(rows: Sequence[Row], title: str, path: Path) -> list[Path]:
    """Images per second against the batch size, for the rows of :func:`by_batch`."""
    lines, written = by_batch(rows), list[Path]()
    if lines and _has_matplotlib():
        labels = {"xlabel": "batch", "ylabel": "images per second", "title": title}
        with _figure(path, written, xscale="log", yscale="log", **labels) as axes:
            for name, line in lines.items():
                axes.plot(sorted(line), [line[batch] for batch in sorted(line)], marker="o", label=name)
    return written


def plot_roofline(result: dict[str, Any], path: Path) -> list[Path]:
    """Operations per second of every op over its operations per byte, and the limits of the device."""
    written: list[Path] = []
    points = [
        (work["flops"] / work["bytes"], work["flops"] / row["forward_s"], row)
        for row in result["rows"]
        if "forward_s" in row and (work := result["work"][f"{row['op']}, {row['use']}"]["forward"])["flops"]
    ]
    if not points or not _has_matplotlib():
        return written
    title = f"{result['hardware']}, {result['dtype']}, forward"
    labels = {"xlabel": "operations per byte", "ylabel": "operations per second", "title": title}
    with _figure(path, written, xscale="log", yscale="log", **labels) as axes:
        ends = [min(p[0] for p in points) / 2, max(p[0] for p in points) * 2]
        ridge = result["flops_per_second"] / result["bytes_per_second"]
        xs = sorted({*ends, min(max(ridge, ends[0]), ends[1])})
        axes.plot(
            xs, [min(x * result["bytes_per_second"], result["flops_per_second"]) for x in xs], "k-", label="floor"
        )
        for variant in dict.fromkeys(row["variant"] for _, _, row in points):
            mine = [(x, y) for x, y, row in points if row["variant"] == variant]
            axes.scatter(*zip(*mine, strict=True), label=variant)
    return written
