"""Compile every Triton kernel ahead of time, and tabulate its registers, spills, shared memory and instructions.

    python benchmarks/resources.py                    # checks all, rewrites benchmarks/resources.json; no GPU needed
    python benchmarks/resources.py --arch 90 --kind bfloat16 --dry-run

The exit status is 1 if a kernel spills registers or a 16-bit matmul does not use the tensor cores.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from t2t_fast.bench.bounds import BATCHES, CHIPS, Chip, resident, seconds, waves
from t2t_fast.bench.common import checkout, write_json
from t2t_fast.bench.launches import shipped_launches
from t2t_fast.bench.sass import Loop, disassemble, inspect, parse
from t2t_fast.bench.terminal import Console, Progress, Table, wide_console
from t2t_fast.config import triton_is_interpreted
from t2t_fast.kernels import configs
from t2t_fast.kernels.costs import Cost
from t2t_fast.usage import OneLineParser, UsageError

ARCHS = (80, 89, 90, 100, 120)
# dtype and torch's float32 matmul precision
KINDS = {
    "float16": (torch.float16, "high"),
    "bfloat16": (torch.bfloat16, "high"),
    "tf32": (torch.float32, "high"),
    "float32": (torch.float32, "highest"),
}
COMPILED_FOR = 128  # images
# Tensor-core instructions in PTX: Ampere and Ada, Hopper, Blackwell.
TENSOR_CORES = re.compile(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma")


class Ahead:
    """A Triton driver without a GPU: kernels compile for ``arch`` and cannot be launched."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton caches per device

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(compiled: Any) -> dict[str, Any]:
    """Registers and bytes of local memory per thread, bytes of shared memory per block, tensor-core instructions."""
    dump = inspect(compiled.asm["cubin"], "cuobjdump", "--dump-resource-usage")
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump)}
    return {
        "registers": found["REG"],
        "spilled_bytes": found["STACK"] + found["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "tensor_cores": sorted(set(TENSOR_CORES.findall(compiled.asm["ptx"]))),
    }


def source_digest() -> str:
    """A digest of the files in kernels/, to tell which sources the table belongs to.

    Raises:
        UsageError: There is no checkout.
    """
    files = sorted((checkout() / "kernels").glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def compile_all(archs: list[int], kinds: list[str]) -> list[dict[str, Any]]:
    """One row per kernel, use, chip and kind of arithmetic; equal kernels are compiled once."""
    rows = []
    work = [(arch, kind) for arch, kind in itertools.product(archs, kinds)]
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("compiling", total=len(work))
        for arch, kind in work:
            dtype, precision = KINDS[kind]
            torch.set_float32_matmul_precision(precision)
            triton.runtime.driver.set_active(Ahead(arch))
            loops: dict[tuple[str, str], tuple[Loop, int]] = {}
            for kernel, use, launch, flops in shipped_launches(dtype, COMPILED_FOR):
                compiled, config = launch.compile(), launch.config
                row = {"kernel": kernel, "use": use, "arch": arch, "kind": kind, "multiplies": flops > 0}
                row |= {"blocks": dict(config.blocks), "num_warps": config.num_warps, "num_stages": config.num_stages}
                found = resources(compiled)
                row |= {"tuned": config.tuned, "assumed": config.resident, **found}
                if chip := CHIPS.get(arch):
                    loop = parse(disassemble(compiled.asm["cubin"]))
                    held = resident(chip, config.num_warps, found["registers"], found["shared_bytes"])
                    loops[kernel, use] = loop, held
                    row |= {"resident": held, "outside": loop.counts, "loops": [i.counts for i in loop.walk()[1:]]}
                rows.append(row)
            if chip:
                add_bounds(rows[-len(loops) :], chip, dtype, loops)
            progress.advance(task)
    return rows


def add_bounds(
    rows: list[dict[str, Any]], chip: Chip, dtype: torch.dtype, loops: dict[tuple[str, str], tuple[Loop, int]]
) -> None:
    """Give each row, for several numbers of images, its programs, its waves of them, and its bound and floor in µs."""
    by_name = {(row["kernel"], row["use"]): row for row in rows}
    for batch in BATCHES:
        for kernel, use, launch, flops in shipped_launches(dtype, batch):
            loop, held = loops[kernel, use]
            floor = Cost(flops, bytes_of(launch.args)).floor(
                chip.bytes_per_second, chip.flops_per_second[configs.kind(dtype)]
            )
            by_name[kernel, use].setdefault("images", {})[str(batch)] = {
                "programs": math.prod(launch.grid),
                "waves": round(waves(chip, launch, held), 3),
                "bound": round(1e6 * seconds(chip, loop, launch), 2),
                "floor": round(1e6 * floor, 2),
            }


def bytes_of(arguments: Any) -> int:
    """Of all tensors in these arguments, each read or written once."""
    if isinstance(arguments, torch.Tensor):
        return arguments.numel() * arguments.element_size()
    return sum(map(bytes_of, arguments)) if isinstance(arguments, tuple) else 0


def faults(rows: list[dict[str, Any]]) -> list[str]:
    """Faults for which a kernel must not ship, as texts."""
    found = []
    for row in rows:
        name = f"{row['kernel']}, {row['use']}, {row['arch']}, {row['kind']}"
        if row["spilled_bytes"]:
            found.append(f"{name}: {row['spilled_bytes']} bytes per thread in local memory")
        if row["multiplies"] and row["kind"] != "float32" and not row["tensor_cores"]:
            found.append(f"{name}: no tensor-core instruction")
    return found


def table_of(rows: list[dict[str, Any]]) -> Table:
    """A line per row."""
    table = Table("kernel", "use", "chip", "kind", "blocks", "warps", "registers", "spilled", "shared", "matmuls")
    for row in rows:
        blocks = " ".join(str(size) for size in row["blocks"].values())
        numbers = (row["num_warps"], row["registers"], row["spilled_bytes"], row["shared_bytes"])
        names = (row["kernel"], row["use"], row["arch"], row["kind"], blocks, *numbers)
        table.add_row(*map(str, names), " ".join(row["tensor_cores"]))
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and return the exit status: 0, 1 if a kernel must not ship, 2 if an argument is impossible."""
    parser = OneLineParser(prog="resources.py", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=list(ARCHS), help="default: all")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    parser.add_argument("--dry-run", action="store_true", help="do not write the table; needed for a selection")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON instead of a table")
    args = parser.parse_args(argv)
    if not args.dry_run and (len(args.arch), len(args.kind)) != (len(ARCHS), len(KINDS)):
        parser.error("a selection of chips or kinds is no whole table: add --dry-run")
    if triton_is_interpreted():
        parser.error("TRITON_INTERPRET is set, and Triton's interpreter compiles nothing: unset it")
    try:
        table = None if args.dry_run else checkout() / "benchmarks" / "resources.json"
        rows = compile_all(args.arch, args.kind)
        if args.json:
            print(json.dumps(rows))
        else:
            wide_console(200).print(table_of(rows))
        wrong = faults(rows)
        for fault in wrong:
            print(fault, file=sys.stderr)
        if table is not None and not wrong:
            write_json(table, {"triton": triton.__version__, "kernels": source_digest(), "rows": rows})
    except UsageError as error:
        parser.error(str(error))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
