"""Measure memory: of inference, of forward, backward and update in training, and the largest single tensor.

    python benchmarks/memory.py                                              # T2T-ViT-14 and T2T-ViT_t-14, 4 images
    python benchmarks/memory.py --models t2t_vit_t_14 --img-size 384 --variants auto checkpointing
    python benchmarks/memory.py --device cuda --batch-size 128 --precision autocast-bfloat16 --output benchmarks/results

Every allocation and release by torch's allocator is recorded, on any device, so the figures are exact and repeatable.
Memory that libraries allocate themselves (workspaces, the CUDA context) is not included. `checkpointing` is `auto` with
`set_grad_checkpointing()`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from t2t_fast.bench import measuring, models
from t2t_fast.bench.common import (
    OUTPUT_HELP,
    command_line,
    new_result,
    positive_int,
    result_path,
    write_json,
)
from t2t_fast.bench.terminal import Console, Table, track, wide_console
from t2t_fast.bench.variants import Row, build, precision_of
from t2t_fast.env import collect_env
from t2t_fast.usage import OneLineParser, UsageError

MODELS = ("t2t_vit_14", "t2t_vit_t_14")
VARIANTS = ("reference", "auto", "aten", "checkpointing")
PRECISIONS = ("float32", "bfloat16", "autocast-bfloat16", "autocast-float16")
PHASES = ("inference", "forward", "kept", "backward", "update")


class Phase(NamedTuple):
    """Bytes above those allocated before: the peak, the end, and the largest tensor."""

    peak: int
    end: int
    largest: int


def record(function: Callable[[], Any], device_type: str) -> tuple[Phase, Any]:
    """Run ``function``; return its memory on that type of device, and its result, which counts as allocated."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
        if device_type != "cpu":
            torch.accelerator.synchronize()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    wanted = getattr(torch.autograd.DeviceType, device_type.upper())
    current = peak = largest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.device_type() == wanted:
            current += event.nbytes()
            peak, largest = max(peak, current), max(largest, event.nbytes())
    return Phase(peak, current, largest), result


def measure(model: str, variant: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """A row: bytes of the parameters and of every phase of a step, after a first step that fills all caches."""
    row = Row(model, None if variant == "checkpointing" else variant, "training", options.precision, options.batch_size,
              options.img_size, 0, 0)  # fmt: skip
    content: dict[str, Any] = {"model": model, "variant": variant, "precision": row.precision}
    content |= {"batch_size": row.batch_size, "img_size": row.img_size, "status": "ok"}
    with measuring.guarded(row):
        build(row, None, device, 0)
        content |= _phases(row, variant, device)
    if row.status != "pending":
        content["status"] = row.status
    row.drop()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return content


def _phases(row: Row, variant: str, device: torch.device) -> dict[str, Any]:
    net: Any = row.module
    if variant == "checkpointing":
        net.set_grad_checkpointing()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6)
    images = torch.randn(row.batch_size, 3, row.img_size, row.img_size, device=device, dtype=row.weight_dtype)

    def forward() -> torch.Tensor:
        with precision_of(row, device):
            return net(images).float().square().mean()

    def infer() -> torch.Tensor:
        with torch.no_grad(), precision_of(row, device):
            return net(images)

    net.eval()
    infer()
    inference, _ = record(infer, device.type)
    net.train()
    forward().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    first, loss = record(forward, device.type)
    second, _ = record(loss.backward, device.type)
    third, _ = record(optimizer.step, device.type)
    return {
        "parameters": sum(p.numel() * p.element_size() for p in net.parameters()),
        "inference": inference.peak,
        "forward": first.peak,
        "kept": first.end,
        "backward": first.end + second.peak,
        "update": first.end + second.end + third.peak,
        "largest_inference": inference.largest,
        "largest_training": max(first.largest, second.largest),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status: 0, or 2 if an argument is impossible."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = OneLineParser(prog="memory.py", description=__doc__)
    add = parser.add_argument
    add("--models", nargs="+", default=list(MODELS), metavar="NAME", help=f"default: {' '.join(MODELS)}")
    add("--variants", nargs="+", default=["reference", "auto", "checkpointing"], choices=VARIANTS, metavar="NAME",
        help=f"{', '.join(VARIANTS)}; default: all but aten")  # fmt: skip
    add("--precision", default="float32", choices=PRECISIONS, help="default: float32")
    add("--batch-size", type=positive_int, default=4, metavar="N", help="default: 4")
    add("--img-size", type=positive_int, default=224, metavar="PIXELS", help="default: 224")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "xpu"), help="auto: a GPU if there is one")
    add("--output", type=Path, metavar="JSON", help=OUTPUT_HELP)
    options = parser.parse_args(argv)
    try:
        path, result = _measure_all(options, argv)
    except UsageError as error:
        parser.error(str(error))
    console = wide_console(110)
    console.print(table_of(result["rows"]))
    console.print(
        f"MB (10^6 bytes) above the memory allocated before, {result['hardware']}, {options.batch_size} images of "
        f"{options.img_size} px, {options.precision}. kept: held for backward; backward and update include it."
    )
    print(f"results: {path}")
    return 0


def _measure_all(options: argparse.Namespace, argv: list[str]) -> tuple[Path, dict[str, Any]]:
    device = measuring.select_device(options.device)
    names = models.resolve_names(options.models)
    foreign = [name for name in names if not models.is_ours(name)]
    if foreign:
        raise UsageError(f"--models: {foreign[0]!r} is none of this package's")
    for name in names:
        models.count(name, options.img_size)  # raises for an impossible size
    env, date = collect_env(), datetime.now().astimezone()
    hardware = measuring.device_name(device, env)
    path = result_path(options.output, f"memory {hardware}", env, date)
    command = command_line("memory", argv)
    result = new_result("memory", date, command, env, device=device.type, hardware=hardware)
    work = [(model, variant) for model in names for variant in dict.fromkeys(options.variants)]
    for model, variant in track(work, "measuring", console=Console(stderr=True), transient=True):
        result["rows"].append(measure(model, variant, options, device))
        write_json(path, result)  # for the case of an interruption
    return path, result


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """A line per row, in megabytes."""
    table = Table("model", "variant", *PHASES, "largest, inference", "largest, training")
    for row in rows:
        names = (*PHASES, "largest_inference", "largest_training")
        cells = [f"{row[name] / 1e6:.1f}" if name in row else row["status"] for name in names]
        table.add_row(row["model"], row["variant"], *cells)
    return table


if __name__ == "__main__":
    sys.exit(main())
