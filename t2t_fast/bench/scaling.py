"""Compute how long training on ImageNet-1k would take on 8, 64 and 512 GPUs: operations, bytes and collectives.

    python benchmarks/scaling.py                                   # the tables of docs/scaling.md
    python benchmarks/scaling.py --result benchmarks/results/FILE.json   # with measured speeds of one GPU
    python benchmarks/scaling.py --write                           # rewrites docs/scaling.md

Data parallel training: every GPU computes forward and backward of its share of the batch; gradients are averaged by a
ring all-reduce within and between nodes, which overlaps with backward. Nothing is measured, except for the speeds that
--result gives. All assumptions are arguments, and the page lists them.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch

from t2t_fast.bench.common import (
    checkout,
    fraction,
    positive_int,
    positive_number,
    read_json,
    write_text,
)
from t2t_fast.bench.tables import Row, markdown, normalised
from t2t_fast.macs import Macs, count_macs
from t2t_fast.usage import OneLineParser, UsageError

MODELS = ("t2t_vit_14", "t2t_vit_19", "t2t_vit_24")
GPUS = (8, 64, 512)
IMAGES, EPOCHS = 1_281_167, 310  # ImageNet-1k's training set; the official schedule, 300 epochs and 10 of cool-down
_WORK = (
    "model",
    "params (M)",
    "forward (GFLOP per image)",
    "training (EFLOP in all)",
    "traffic (MB per image)",
    "gradients (MB)",
)
_STEP = (
    "model",
    "GPUs",
    "batch",
    "arithmetic (ms)",
    "memory (ms)",
    "all-reduce (ms)",
    "not hidden (ms)",
    "efficiency",
    "images/s",
    "minutes for 310 epochs",
)
MARKER = re.compile(r"(<!-- computed -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Machine:
    """The assumed hardware.

    Attributes:
        flops: Operations per second of large 16-bit matmuls on one GPU.
        efficiency: The fraction of ``flops`` that a training step reaches.
        bandwidth: Bytes per second of a GPU's memory.
        node: GPUs in a node.
        link: Bytes per second that a GPU sends to its neighbour in the node.
        network: Bytes per second that a node sends to another node, per GPU.
        latency: Seconds of one step of a ring.
        overlap: The largest fraction of the all-reduce that backward hides.
    """

    flops: float
    efficiency: float
    bandwidth: float
    node: int
    link: float
    network: float
    latency: float
    overlap: float


@dataclass(frozen=True)
class Step:
    """Seconds of a training step: arithmetic, memory traffic, all-reduce, and its part that backward does not hide."""

    arithmetic: float
    memory: float
    all_reduce: float
    exposed: float

    @property
    def compute(self) -> float:
        """Arithmetic and traffic overlap, so the longer of the two."""
        return max(self.arithmetic, self.memory)

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed


def all_reduce(size: float, gpus: int, machine: Machine) -> float:
    """Seconds of a ring all-reduce of ``size`` bytes: 2 (n - 1) / n of the bytes over a link, and 2 (n - 1) latencies.

    Across nodes it is hierarchical: rings within the nodes, then a ring between nodes for each GPU's share.
    """
    inside = min(gpus, machine.node)
    seconds = 2 * (inside - 1) / inside * size / machine.link + 2 * (inside - 1) * machine.latency
    nodes = gpus // inside
    if nodes > 1:
        share = size / inside
        seconds += 2 * (nodes - 1) / nodes * share / machine.network + 2 * (nodes - 1) * machine.latency
    return seconds


def traffic(activations: int) -> int:
    """Bytes through a GPU's memory for one image in 16 bits, if everything but matmuls is fused.

    Each result of a matmul is written and read in forward and read in backward; its gradient is written and read.
    """
    return 2 * 5 * activations


def step(cost: Macs, batch: int, gpus: int, machine: Machine, images_per_second: float | None) -> Step:
    """A step of ``batch`` images per GPU. Backward has twice the matmuls; gradients and AdamW's state are float32.

    A measured speed of one GPU replaces both arithmetic and traffic.
    """
    speed = images_per_second or machine.flops * machine.efficiency / (3 * 2 * cost.macs)
    update = 4 * 7 * cost.params  # AdamW reads parameter, gradient and two moments, and writes all but the gradient
    memory = 0.0 if images_per_second else (batch * traffic(cost.activations) + update) / machine.bandwidth
    reduction = all_reduce(4 * cost.params, gpus, machine)
    computed = Step(batch / speed, memory, reduction, 0.0)
    hidden = min(machine.overlap * reduction, computed.compute * 2 / 3)  # backward is two thirds of the step
    return replace(computed, exposed=reduction - hidden)


def measured(path: Path, batch: int) -> dict[str, Row]:
    """Rows of training on one GPU at 224 px from a file of throughput.py, by model.

    Of a model's rows the one with this batch size is preferred, then ``auto``, then the fastest.

    Raises:
        UsageError: The file has no such row.
    """
    result = read_json("--result", path)
    if result.get("device") != "cuda":
        raise UsageError(
            f"--result: {str(path)!r} was measured on {result.get('device')!r}; pass a GPU's training file"
        )
    if result.get("with_loader"):
        raise UsageError(f"--result: {str(path)!r} was measured with its loader; pass a file without")
    found: dict[str, Row] = {}
    try:
        rows = [row for row in normalised(result) if row["mode"] == "training" and row["status"] == "ok"]
        rows = [row for row in rows if row["model"] in MODELS and row["img_size"] == 224]
        for row in sorted(rows, key=lambda r: (r["batch_size"] == batch, r["variant"] == "auto", _speed(r))):
            found[row["model"]] = row
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"--result: {str(path)!r} is no file of throughput.py ({error!r}); pass one") from error
    if not found:
        raise UsageError(f"--result: {str(path)!r} has no training speed of {', '.join(MODELS)}; pass one that has")
    return {name: found[name] for name in MODELS if name in found}


def _speed(row: Row) -> float:
    if not row["images_per_second"] > 0:
        raise ValueError(f"images_per_second: {row['images_per_second']}")
    return float(row["images_per_second"])


def told(path: Path, rows: Mapping[str, Row]) -> str:
    """A sentence on which figures are measured, and on which hardware."""
    hardware = read_json("--result", path).get("hardware")
    parts = (
        f"{name} {row['images_per_second']:.0f} ({row['variant']}, {row['precision']}, batches of {row['batch_size']})"
        for name, row in rows.items()
    )
    committed = path.resolve().parent.parts[-2:] == ("benchmarks", "results")
    file = f"[{path.name}](../benchmarks/results/{path.name})" if committed else path.name
    text = f"Measured on one {hardware}, images per second: {', '.join(parts)}; {file}."
    return f"{text} The time under arithmetic is theirs, traffic included; models without a measurement are computed."


def tables(machine: Machine, batch: int, rates: Mapping[str, float]) -> str:
    """Two Markdown tables, of each model's work and of steps; ``rates`` are measured speeds of one GPU by model."""
    work: list[tuple[str, ...]] = []
    rows: list[tuple[str, ...]] = []
    for name in MODELS:
        with torch.device("meta"):
            cost = count_macs(timm.create_model(name))
        total = 6 * cost.macs * IMAGES * EPOCHS
        cells = (f"{cost.params / 1e6:.1f}", f"{2 * cost.macs / 1e9:.1f}", f"{total / 1e18:.1f}")
        work.append((name, *cells, *(f"{value / 1e6:.0f}" for value in (traffic(cost.activations), 4 * cost.params))))
        for gpus in GPUS:
            s = step(cost, batch, gpus, machine, rates.get(name))
            speed = gpus * batch / s.seconds
            minutes = EPOCHS * IMAGES / speed / 60
            times = (f"{1e3 * t:.2f}" for t in (s.arithmetic, s.memory, s.all_reduce, s.exposed))
            efficiency = f"{100 * s.compute / s.seconds:.1f}%"
            rows.append((name, str(gpus), str(gpus * batch), *times, efficiency, f"{speed:.0f}", f"{minutes:.1f}"))
    return "\n\n".join((markdown(_WORK, work), markdown(_STEP, rows)))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = OneLineParser(prog="scaling.py", description=__doc__)
    add = parser.add_argument
    add("--batch-size", type=positive_int, default=128, metavar="N", help="images per GPU; default: 128")
    add("--result", type=Path, metavar="JSON", help="file of throughput.py --mode training on a GPU: measured speeds")
    add("--flops", type=positive_number, default=989e12, help="default: 989e12, an H100 SXM's dense bfloat16")
    add(
        "--efficiency",
        type=fraction,
        default=0.25,
        help="fraction of --flops in a training step; default: 0.25, a guess",
    )
    add("--bandwidth", type=positive_number, default=3.35e12, help="bytes/s; default: 3.35e12, an H100 SXM's memory")
    add("--node", type=positive_int, default=8, metavar="N", help="GPUs in a node; default: 8")
    add("--link", type=positive_number, default=450e9, help="bytes/s; default: 450e9, NVLink 4 in one direction")
    add("--network", type=positive_number, default=50e9, help="bytes/s per GPU; default: 50e9, 400 Gbit/s")
    add("--latency", type=positive_number, default=5e-6, help="seconds of a ring's step; default: 5e-6, a guess")
    add("--overlap", type=fraction, default=0.9, help="hidden part of the all-reduce; default: 0.9, a guess")
    add("--write", action="store_true", help="rewrite docs/scaling.md")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print or write the tables; the exit status is 0, or 2 if an argument is impossible."""
    options = parse(sys.argv[1:] if argv is None else argv)
    names = ("flops", "efficiency", "bandwidth", "node", "link", "network", "latency", "overlap")
    machine = Machine(**{name: getattr(options, name) for name in names})
    try:
        page = checkout() / "docs" / "scaling.md" if options.write else None
        rows = {} if options.result is None else measured(options.result, options.batch_size)
        text = tables(machine, options.batch_size, {name: row["images_per_second"] for name, row in rows.items()})
        if rows:
            text += f"\n\n{told(options.result, rows)}"
        if page is None:
            print(text)
        else:
            write_text(page, MARKER.sub(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", page.read_text()))
    except UsageError as error:
        print(f"scaling.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
