"""Write the tables of docs/ and README.md, and the plots in docs/, from the committed files of benchmarks/ alone.

    python benchmarks/report.py              # after a result file, or resources.json, was added, changed or removed
    python benchmarks/report.py --check      # exit status 1 if docs and files disagree

Tables are between `<!-- generated: NAME -->` and `<!-- end -->`; the text around them is written by hand. Of several
files with the same benchmark, hardware and command, the newest is shown.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t2t_fast.bench import bound_tables
from t2t_fast.bench.common import checkout, slug, write_text
from t2t_fast.bench.plots import by_batch, plot_batches, plot_macs, plot_roofline, plot_top1, with_top1
from t2t_fast.bench.tables import KINDS, Result, Row, markdown, normalised, rate
from t2t_fast.bench.variants import arithmetic
from t2t_fast.models.variants import VARIANTS
from t2t_fast.usage import OneLineParser, UsageError

DOCS = ("README.md", "docs/results.md", "docs/kernels.md")
NOT_YET = "Not measured yet."
# What else runs a T2T-ViT: its definition, plain or compiled by torch, and other runtimes with exported programs.
OTHERS = ("reference", "compiled-reference", "onnx", "openvino", "openvino-bf16")
MARKER = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
# Columns of the README's table: heading, model, variant.
COLUMNS = (
    ("t2t_vit_14, reference", "t2t_vit_14", "reference"),
    ("auto", "t2t_vit_14", "auto"),
    ("frozen", "t2t_vit_14", "frozen"),
    ("DeiT-S", "deit_small_patch16_224", None),
    ("ResNet-50", "resnet50", None),
)


def load(folder: Path) -> list[tuple[Path, Result]]:
    """The newest file of each benchmark, hardware and command, with its path; sorted by hardware and date.

    Raises:
        UsageError: A file is not a result file.
    """
    newest: dict[tuple[Any, ...], tuple[Path, Result]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text())
            key = (result["benchmark"], result.get("hardware"), result["command"])
            older = newest.get(key)
            if result["benchmark"] in KINDS and (older is None or older[1]["date"] < result["date"]):
                newest[key] = (path, result)
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{path} is no result file of these benchmarks ({error!r}); remove or repair it"
            ) from error
    order = list(KINDS)
    return sorted(
        newest.values(), key=lambda f: (f[1].get("hardware") or "~", order.index(f[1]["benchmark"]), f[1]["date"])
    )


def blocks(files: Sequence[tuple[Path, Result]]) -> dict[str, str]:
    """The names of the generated blocks, and their texts."""
    on = {device: [f for f in files if f[1].get("device") == device] for device in ("cpu", "cuda")}
    return {
        "measured": _measured(files),
        "cpu": _by_hardware(on["cpu"]),
        "gpu": _by_hardware(on["cuda"]),
        "macs": "\n\n".join(_section(*f) for f in files if f[1]["benchmark"] == "macs") or NOT_YET,
    }


def _by_hardware(files: Sequence[tuple[Path, Result]]) -> str:
    parts = []
    for hardware in dict.fromkeys(result["hardware"] for _, result in files):
        mine = [f for f in files if f[1]["hardware"] == hardware]
        parts.append(f"### {hardware.removeprefix('cpu ')}")
        parts += [f"![]({name})" for name in _pictures(hardware, mine)]
        parts += [_section(*f) for f in mine]
    return "\n\n".join(parts) or NOT_YET


def _section(path: Path, result: Result) -> str:
    env = result["environment"]
    git = env.get("git") or {}
    commit = f"commit {git['commit'][:9]}{' with changes' if git['dirty'] else ''}, " if git.get("commit") else ""
    cpu = f"{env['cpu']['torch_threads']} threads, " if result.get("device") == "cpu" else ""
    source = (
        f"[{path.name}](../benchmarks/results/{path.name}): {cpu}torch {env['torch']}, {commit}{result['date'][:10]}"
    )
    return f"{KINDS[result['benchmark']](result)}\n\n{source}, `{result['command']}`."


def _measured(files: Sequence[tuple[Path, Result]]) -> str:
    """A row for every machine, mode, precision and batch in which ``auto`` T2T-ViT-14 was measured at 224 px."""
    body: dict[tuple[Any, ...], list[str]] = {}
    for path, result in files:
        # A loader's time is included in the one, and the other is a table by itself.
        if result["benchmark"] != "throughput" or result.get("with_loader") or result.get("grid"):
            continue
        kinds: dict[tuple[Any, ...], dict[tuple[Any, ...], float]] = {}
        for row in normalised(result):
            if row["seconds"] and row["img_size"] == 224:
                kind = (row["mode"], row["precision"], row["batch_size"])
                kinds.setdefault(kind, {})[(row["model"], row["variant"])] = row["images_per_second"]
        for kind, rates in kinds.items():
            if ("t2t_vit_14", "auto") in rates:
                cells = [rate(rates[key]) if (key := column[1:]) in rates else "" for column in COLUMNS]
                cells.append(_best_of_others(rates, kind[1]))
                mode, precision, batch = kind
                hardware = result["hardware"].removeprefix("cpu ")
                link = f"[{mode}, {precision}, batch {batch}](benchmarks/results/{path.name})"
                body[(hardware, *kind)] = [hardware, link, *cells]  # files are sorted by date, so the newest wins
    headings = ["", "images per second", *(column[0] for column in COLUMNS), "T2T-ViT-14, best of the others"]
    return markdown(headings, body.values()) if body else NOT_YET


def _best_of_others(rates: dict[tuple[Any, ...], float], precision: str) -> str:
    """The fastest T2T-ViT-14 that is not this package's, in the arithmetic of ``precision``."""
    same = [name for name in OTHERS if arithmetic(name, precision) == precision and ("t2t_vit_14", name) in rates]
    best = max(same, key=lambda name: rates["t2t_vit_14", name], default=None)
    return "" if best is None else f"{rate(rates['t2t_vit_14', best])} ({best})"


def _most_rows(files: Sequence[tuple[Path, Result]]) -> list[Row]:
    """The inference rows of a machine's largest file, in the file's first precision."""
    results = (result for _, result in files if result["benchmark"] == "throughput" and not result.get("grid"))
    runs = [[row for row in normalised(result) if row["mode"] == "inference"] for result in results]
    runs = [[r for r in rows if r["batch_size"] != 1 and r["precision"] == rows[0]["precision"]] for rows in runs]
    return max(runs, key=len, default=[])


def _top1() -> dict[str, float]:
    return {name: v.published.top1 for name, v in VARIANTS.items() if v.published}


def _pictures(hardware: str, files: Sequence[tuple[Path, Result]]) -> list[str]:
    """Names of the plots that a machine's files have figures for; see :func:`draw`."""
    rows = _most_rows(files)
    figures = {
        "throughput": rows,
        "top1": with_top1(rows, _top1()),
        "batches": by_batch(rows),
        "roofline": [result for _, result in files if result["benchmark"] == "kernels"],
    }
    return [f"{name}-{slug(hardware)}.svg" for name, has in figures.items() if has]


def draw(files: Sequence[tuple[Path, Result]], folder: Path) -> list[Path]:
    """Draw each machine's inference file with most rows, and its kernel file; the files written."""
    top1, written = _top1(), list[Path]()
    for hardware in dict.fromkeys(str(result["hardware"]) for _, result in files if result.get("hardware")):
        mine = [f for f in files if f[1].get("hardware") == hardware]
        if rows := _most_rows(mine):
            title = f"{hardware}, inference, {rows[0]['precision']}"
            written += plot_macs(rows, title, folder / f"throughput-{slug(hardware)}")
            written += plot_top1(rows, top1, title, folder / f"top1-{slug(hardware)}")
            written += plot_batches(rows, title, folder / f"batches-{slug(hardware)}")
        for result in (result for _, result in mine if result["benchmark"] == "kernels"):
            written += plot_roofline(result, folder / f"roofline-{slug(hardware)}")
    return written


def fill(text: str, generated: dict[str, str]) -> str:
    """``text`` with its generated blocks replaced.

    Raises:
        UsageError: The text has a block with an unknown name.
    """

    def replace(match: re.Match[str]) -> str:
        if match[2] not in generated:
            raise UsageError(f"there is no generated block {match[2]!r}; known: {', '.join(generated)}")
        return f"{match[1]}\n{generated[match[2]]}\n\n{match[3]}"

    return MARKER.sub(replace, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check, and return the exit status."""
    parser = OneLineParser(prog="report.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if something would change")
    options = parser.parse_args(argv)
    try:
        root = checkout()
        files = load(root / "benchmarks" / "results")
        resources = json.loads((root / "benchmarks" / "resources.json").read_text())
        generated = blocks(files) | {name: make(resources) for name, make in bound_tables.TABLES.items()}
        stale = []
        for name in DOCS:
            text = (root / name).read_text()
            if (filled := fill(text, generated)) != text:
                stale.append(name)
                if not options.check:
                    write_text(root / name, filled)
    except UsageError as error:
        parser.error(str(error))
    if options.check:
        for name in stale:
            print(f"{name} disagrees with benchmarks/results: run python benchmarks/report.py")
        return 1 if stale else 0
    pictures = draw(files, root / "docs")
    print(f"{len(files)} result files; rewritten: {', '.join(stale) or 'nothing'}; {len(pictures)} pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
