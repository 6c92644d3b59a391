"""Compile every Triton kernel this package ships, ahead of time, and tabulate what it takes of the chip.

    python benchmarks/resources.py                    # checks all, rewrites benchmarks/resources.json; no GPU needed
    python benchmarks/resources.py --arch 90 --kind bfloat16 --dry-run

A kernel that spills registers, or a 16-bit product that misses the tensor cores, makes the exit status 1.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # the interpreter compiles nothing
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from _common import OneLineParser, write_json
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from triton.backends.compiler import GPUTarget

from t2t_fast.kernels import (
    add_layer_norm,
    configs,
    performer_attention,
    soft_split,
    soft_split_linear,
    soft_split_performer,
    token_performer,
)
from t2t_fast.kernels.launch import Launch
from t2t_fast.kernels.windows import View, Window, make_view, make_window
from t2t_fast.reference.soft_split import as_image

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks" / "resources.json"
ARCHS = (80, 89, 90, 100, 120)
# dtype and torch's float32 matmul precision
KINDS = {
    "float16": (torch.float16, "high"),
    "bfloat16": (torch.bfloat16, "high"),
    "tf32": (torch.float32, "high"),
    "float32": (torch.float32, "highest"),
}
# The uses in t2t_vit_14 at 224 px: channels, side, kernel, stride, padding, out, as tokens, with a LayerNorm.
USES = {
    "image to 192": (3, 224, 7, 4, 2, 192, False, True),
    "tokens to 192": (64, 56, 3, 2, 1, 192, True, True),
    "tokens to 384": (64, 28, 3, 2, 1, 384, True, False),
}
# Tensor-core instructions in PTX: Ampere and Ada, Hopper, Blackwell.
TENSOR_CORES = re.compile(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma")


class Ahead:
    """A driver without a GPU: it knows for which chip to compile, and nothing can be launched."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton's caches go by device

    def get_current_stream(self, device: int) -> int:
        return 0


def shipped_launches(dtype: torch.dtype) -> Iterator[tuple[str, str, Launch, bool]]:
    """(kernel, use, launch, whether it multiplies matrices) of all that the model launches in ``dtype``."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    batch = 8
    for use, (channels, side, kernel, stride, padding, out, as_tokens, norm) in USES.items():
        image = empty(batch, channels, side, side)
        if as_tokens:
            image = image.contiguous(memory_format=torch.channels_last)
        window = make_window(channels, (kernel,) * 2, (stride,) * 2, (padding,) * 2, as_tokens)
        view = make_view(image, window)
        length = view.grid_h * view.grid_w
        tokens, offset = empty(batch, length, out), empty(out, dtype=torch.float32)
        mean, rstd, coefficient = (empty(batch, length, dtype=torch.float32) for _ in range(3))
        packed = soft_split_linear.pack_weight(empty(out, window.num_features), window, dtype)
        for name, statistics in (("", None), (" training", (mean, rstd)))[: 1 + norm]:
            launch = soft_split_linear.forward_launch(
                image, packed, offset, tokens, statistics, view, window, norm, 1e-5
            )
            yield f"soft_split_linear forward{name}", use, launch, True
        d_weight = empty(4, out, window.num_features, dtype=torch.float32)
        launch = soft_split_linear.backward_weight_launch(
            tokens, image, (mean, rstd) if norm else None, d_weight, d_weight[:, :, 0], dtype, view, window
        )
        yield "soft_split_linear backward weight", use, launch, True
        triple = (mean, rstd, coefficient) if norm else None
        launch = soft_split_linear.backward_input_launch(tokens, packed, image, triple, image, view, window)
        yield "soft_split_linear backward input", use, launch, True
        if norm:
            launch = soft_split_linear.coefficient_launch(
                tokens, tokens, offset, rstd, coefficient, window.num_features
            )
            yield "soft_split_linear coefficient", use, launch, False
            if configs.has_config(configs.SOFT_SPLIT_PERFORMER, image.device, dtype):
                yield "soft_split_performer", use, joined_launch(image, packed, offset, dtype, view, window), True
        plain = window._replace(channels_last=False)
        unfolded = empty(batch, length, window.num_features)
        yield "soft_split forward", use, soft_split.forward_launch(image, unfolded, view, plain), False
        yield "soft_split backward", use, soft_split.backward_launch(unfolded, image, view, plain), False
    yield from performer_launches(dtype)
    yield from block_launches(dtype)


def block_launches(dtype: torch.dtype) -> Iterator[tuple[str, str, Launch, bool]]:
    """As :func:`shipped_launches`, of what the backbone's blocks can launch: T2T-ViT-14, 197 tokens of 384 channels."""
    batch, tokens, dim, hidden = 8, 197, 384, 1152
    rows, weight = (torch.empty(*shape, dtype=dtype, device="meta") for shape in ((batch, tokens, dim), (hidden, dim)))
    wide, offset = rows.new_empty(batch, tokens, hidden), torch.empty(hidden, device="meta")
    statistics = torch.empty(batch, tokens, device="meta"), torch.empty(batch, tokens, device="meta")
    image = as_image(rows, (1, tokens))
    window = make_window(dim, (1, 1), (1, 1), (0, 0), True)
    view = make_view(image, window)
    for name, norm, plain in (("", True, None), (" without norm", False, None), (" training", True, wide)):
        kept = None if plain is None else statistics
        launch = soft_split_linear.forward_launch(
            image, weight, offset, wide, kept, view, window, norm, 1e-5, True, plain
        )
        yield f"layer_norm_linear with gelu{name}", "197 tokens", launch, True
    d_weight = torch.empty(4, hidden, dim, device="meta")
    launch = soft_split_linear.backward_weight_launch(
        wide, image, statistics, d_weight, d_weight[:, :, 0], dtype, view, window
    )
    yield "layer_norm_linear backward weight", "197 tokens", launch, True
    triple = (*statistics, statistics[0])
    yield (
        "layer_norm_linear backward input",
        "197 tokens",
        soft_split_linear.backward_input_launch(wide, weight, image, triple, image, view, window),
        True,
    )
    vector, scale, splits = torch.empty(dim, device="meta"), torch.empty(batch, device="meta"), 4
    for name, factor, kept in (("", None, None), (" training", scale, statistics)):
        launch = add_layer_norm.forward_launch(rows, rows, factor, vector, vector, rows, rows, kept, 1e-5)
        yield f"add_layer_norm forward{name}", "197 tokens", launch, False
    d_vector = torch.empty(splits, dim, device="meta")
    launch = add_layer_norm.backward_launch(
        rows, rows, rows, statistics, scale, vector, rows, rows, d_vector, d_vector, splits
    )
    yield "add_layer_norm backward", "197 tokens", launch, False


def joined_launch(
    image: Tensor, packed: Tensor, offset: Tensor, dtype: torch.dtype, view: View, window: Window
) -> Launch:
    batch, length, dim, features, splits = image.shape[0], view.grid_h * view.grid_w, packed.shape[0] // 3, 32, 4
    total = torch.empty(batch, splits, features, device="meta")
    sums = (total, total, torch.empty(*total.shape, dim, device="meta"))
    v, exponents = torch.empty(batch, length, dim, dtype=dtype, device="meta"), total.new_empty(batch, length, features)
    w = torch.empty(features, dim, dtype=dtype, device="meta")
    return soft_split_performer.forward_launch(image, packed, offset, w, exponents, v, sums, view, window, 1e-5)


def performer_launches(dtype: torch.dtype) -> Iterator[tuple[str, str, Launch, bool]]:
    """As :func:`shipped_launches`, of the Performer's attention over the views of one (B, T, 3E) tensor."""
    batch, length, dim, features, splits = 8, 3136, 64, 32, 4
    k, q, v = torch.empty(batch, length, 3 * dim, dtype=dtype, device="meta").chunk(3, dim=-1)
    y = torch.empty(batch, length, dim, dtype=dtype, device="meta")
    w = torch.empty(features, dim, dtype=dtype, device="meta")

    def sums(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
        total = torch.empty(*shape, features, device="meta")
        return total, total, torch.empty(*shape, features, dim, device="meta")

    parts, whole = sums(batch, splits), sums(batch)
    use, attention = "3136 tokens", performer_attention
    yield "performer_attention summary", use, attention.summary_launch(k, v, w, *parts), True
    yield "performer_attention query", use, attention.query_launch(q, w, *whole, y, 1e-8, splits), True
    for name, dw in (("", None), (" with dw", parts[2])):
        launch = attention.backward_query_launch(y, q, w, *whole, y, *parts[1:], dw, 1e-8)
        yield f"performer_attention backward query{name}", use, launch, True
        launch = attention.backward_key_launch(k, v, w, *whole, y, y, dw, splits)
        yield f"performer_attention backward key{name}", use, launch, True
    yield from token_performer_launches(dtype, (q, v, w, whole, y), parts)


def token_performer_launches(
    dtype: torch.dtype, tensors: tuple[Any, ...], parts: tuple[Tensor, ...]
) -> Iterator[tuple[str, str, Launch, bool]]:
    """As :func:`shipped_launches`, of the layer behind the attention, without and with its default dropout."""
    q, v, w, whole, y = tensors
    if not configs.has_config(configs.TOKEN_PERFORMER, v.device, dtype):
        return
    dim, splits = y.shape[2], parts[0].shape[1]
    layer = token_performer.Layer(
        *(torch.empty(*shape, device="meta") for shape in ((dim,), (dim, dim), (dim,), (dim, dim), (dim,)))
    )
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    eps = (1e-8, 1e-5)
    exponents = torch.empty(*y.shape[:2], w.shape[0], device="meta")
    nothing = token_performer.make_dropout(None, 0.0, 0.0)
    launch = token_performer.forward_launch(
        exponents, y, w, whole, y, layer, nothing, dtype, *eps, splits, from_exponents=True
    )
    yield "token_performer forward from exponents", "3136 tokens", launch, True
    for name, dropout in (
        ("", nothing),
        (" with dropout", token_performer.make_dropout(seed, 0.1, 0.1)),
    ):
        launch = token_performer.forward_launch(q, v, w, whole, y, layer, dropout, dtype, *eps, splits)
        yield f"token_performer forward{name}", "3136 tokens", launch, True
        if not configs.has_config(configs.TOKEN_PERFORMER_BACKWARD, v.device, dtype):
            continue
        launch = token_performer.backward_launch(y, q, v, w, whole, layer, dropout, y, y, parts[1:], layer, dtype, *eps)
        yield f"token_performer backward{name}", "3136 tokens", launch, True


def resources(compiled: Any) -> dict[str, Any]:
    """Registers per thread, bytes of local memory per thread and of shared memory per block, and tensor cores."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump)}
    return {
        "registers": found["REG"],
        "spilled_bytes": found["STACK"] + found["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "tensor_cores": sorted(set(TENSOR_CORES.findall(compiled.asm["ptx"]))),
    }


def source_digest() -> str:
    """Of the kernels and their configurations: the table belongs to these."""
    files = sorted((ROOT / "kernels").glob("*.py"))
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
            for kernel, use, launch, multiplies in shipped_launches(dtype):
                row = {"kernel": kernel, "use": use, "arch": arch, "kind": kind, "multiplies": multiplies}
                row |= {"blocks": dict(launch.config.blocks), "num_warps": launch.config.num_warps}
                row |= {"num_stages": launch.config.num_stages, "tuned": launch.config.tuned}
                rows.append(row | resources(launch.compile()))
            progress.advance(task)
    return rows


def faults(rows: list[dict[str, Any]]) -> list[str]:
    """What must not ship."""
    found = []
    for row in rows:
        name = f"{row['kernel']}, {row['use']}, {row['arch']}, {row['kind']}"
        if row["spilled_bytes"]:
            found.append(f"{name}: {row['spilled_bytes']} bytes per thread in local memory")
        if row["multiplies"] and row["kind"] != "float32" and not row["tensor_cores"]:
            found.append(f"{name}: no tensor-core instruction")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=list(ARCHS), help="default: all")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    parser.add_argument("--dry-run", action="store_true", help="do not write the table; needed for a selection")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON in place of a table")
    args = parser.parse_args(argv)
    if not args.dry_run and (len(args.arch), len(args.kind)) != (len(ARCHS), len(KINDS)):
        parser.error("a selection of chips or kinds is no whole table: add --dry-run")
    rows = compile_all(args.arch, args.kind)
    if args.json:
        print(json.dumps(rows))
    else:
        table = Table("kernel", "use", "chip", "kind", "blocks", "warps", "registers", "spilled", "shared", "products")
        for row in rows:
            blocks = " ".join(str(size) for size in row["blocks"].values())
            numbers = (row["num_warps"], row["registers"], row["spilled_bytes"], row["shared_bytes"])
            names = (row["kernel"], row["use"], row["arch"], row["kind"], blocks, *numbers)
            table.add_row(*map(str, names), " ".join(row["tensor_cores"]))
        Console(width=200).print(table)
    wrong = faults(rows)
    for fault in wrong:
        print(fault, file=sys.stderr)
    if not args.dry_run and not wrong:
        content = {"triton": triton.__version__, "kernels": source_digest(), "rows": rows}
        write_json(TABLE, content)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
