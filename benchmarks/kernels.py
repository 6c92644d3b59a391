"""The soft splits and Performer stages of a model: work, floor, and where there is a GPU the time taken.

    python benchmarks/kernels.py                                    # those of t2t_vit_14, batch 128, bfloat16
    python benchmarks/kernels.py --batch-size 32 --dtype float16 --output benchmarks/results

The floor is the time that the bytes (each read or written once) or the operations take at the GPU's own rates: those of
a large copy and a large matrix product measured in the same run. Without a GPU the table holds the work alone.
A row whose result is wrong prints its error in place of a time, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import OneLineParser, UsageError, positive_int, result_path, write_json
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from t2t_fast import ops
from t2t_fast.env import collect_env
from t2t_fast.kernels import costs
from t2t_fast.kernels.windows import make_view, make_window

# Channels, side, kernel, stride, padding, out, as tokens, with a LayerNorm, with the Performer layer behind.
USES = {
    "image to 192": (3, 224, 7, 4, 2, 192, False, True, False),
    "tokens to 192": (64, 56, 3, 2, 1, 192, True, True, False),
    "tokens to 384": (64, 28, 3, 2, 1, 384, True, False, False),
    "image, whole stage": (3, 224, 7, 4, 2, 192, False, True, True),
    "tokens, whole stage": (64, 56, 3, 2, 1, 192, True, True, True),
}
# Relative norm of the worst among tokens and gradients: a wide mesh, what is wrong is off by far more.
TOLERANCE = {"float16": 1e-2, "bfloat16": 8e-2, "float32": 2e-3}


def ceilings(dtype: torch.dtype) -> tuple[float, float]:
    """Bytes per second of a large copy, and operations per second of a large product."""
    from triton.testing import do_bench

    source = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = do_bench(lambda: target.copy_(source), return_mode="median")
    a, b = (torch.randn(8192, 8192, dtype=dtype, device="cuda") for _ in range(2))
    product = do_bench(lambda: a @ b, return_mode="median")
    return 2 * source.numel() / copy * 1e3, 2 * 8192**3 / product * 1e3


def make_inputs(use: str, batch: int, dtype: torch.dtype, needs_dx: bool) -> tuple[list[Tensor | None], Any]:
    """Random tensors of a use on the GPU, and the rest of the arguments; a stage has no dropout."""
    channels, side, kernel, stride, padding, out, as_tokens, norm, stage = USES[use]
    n = channels * kernel**2
    shape = (batch, side**2, channels) if as_tokens else (batch, channels, side, side)
    options: Any = {"dtype": dtype, "device": "cuda"}
    x = torch.randn(shape, **options).requires_grad_(needs_dx)
    weights = [torch.randn(out, n, **options) / n**0.5, torch.randn(out, **options)]
    norms = [1 + 0.1 * torch.randn(n, **options), 0.1 * torch.randn(n, **options)] if norm else [None, None]
    leaves = [t if t is None else t.requires_grad_() for t in (*weights, *norms)]
    if stage:
        dim = out // 3
        matrices = [torch.randn(dim, dim, **options) / dim**0.5 for _ in range(3)]
        vectors = [0.1 * torch.randn(dim, **options) for _ in range(5)]
        vectors[1] += 1  # the LayerNorm's gamma
        layer = [matrices[0], *vectors[:3], matrices[1], vectors[3], matrices[2], vectors[4]]
        w = torch.nn.init.orthogonal_(torch.empty(dim // 2, dim, device="cuda")) * (dim // 2) ** 0.5
        leaves += [w.to(dtype), *(t.requires_grad_() for t in layer)]
    return [x, *leaves], ((kernel,) * 2, (stride,) * 2, (padding,) * 2, (side, side) if as_tokens else None)


def runners(op: Callable[..., Tensor], geometry: Any) -> dict[str, Callable[..., Tensor]]:
    """Variant to a function from the tensors of a use to its tokens."""

    def run(backend: str) -> Callable[..., Tensor]:
        return lambda *tensors: op(*tensors, *geometry, backend=backend)

    compiled = torch.compile(run("reference"), dynamic=False)
    return {
        "reference": run("reference"),
        "reference, compiled": compiled,
        "aten": run("aten"),
        "triton": run("triton"),
    }


def with_gradients(function: Callable[..., Tensor], tensors: list[Tensor | None]) -> list[Tensor]:
    """The tokens, and the gradients of every tensor that wants one for a fixed random gradient of the tokens."""
    tokens = function(*tensors)
    generator = torch.Generator("cuda").manual_seed(0)
    grad = torch.randn(tokens.shape, generator=generator, device="cuda").to(tokens.dtype)
    return [tokens, *torch.autograd.grad(tokens, [t for t in tensors if t is not None and t.requires_grad], grad)]


def measure(use: str, batch: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Forward, and forward with backward, of every variant; the first of training needs no image gradient."""
    from triton.testing import do_bench

    rows: list[dict[str, Any]] = []
    tensors, geometry = make_inputs(use, batch, dtype, needs_dx=not use.startswith("image"))
    exact = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    variants = runners(ops.soft_split_performer if USES[use][-1] else ops.soft_split_linear, geometry)
    want = with_gradients(variants["reference"], exact)
    for variant, function in variants.items():
        got = with_gradients(function, tensors)
        errors = [((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True)]
        row: dict[str, Any] = {"use": use, "variant": variant, "error": torch.tensor(errors).max().item()}
        # Gradients that cancel are as wrong in the literal form: no worse than twice that. NaN does not pass.
        literal = 2 * rows[0]["error"] if rows and rows[0]["passed"] else 0.0
        row["limit"] = max(TOLERANCE[str(dtype).removeprefix("torch.")], literal)
        row["passed"] = row["error"] < row["limit"]
        if row["passed"]:
            with torch.no_grad():
                row["forward_s"] = do_bench(lambda f=function: f(*tensors), return_mode="median") / 1e3
            step = lambda f=function: with_gradients(f, tensors)  # noqa: E731
            row["training_s"] = do_bench(step, return_mode="median") / 1e3
        rows.append(row)
    return rows


def work(use: str, batch: int, itemsize: int) -> dict[str, costs.Cost]:
    """The least that forward, and forward with backward, have to do."""
    channels, side, kernel, stride, padding, out, _, norm, stage = USES[use]
    window = make_window(channels, (kernel,) * 2, (stride,) * 2, (padding,) * 2, False)
    view = make_view(torch.empty(batch, channels, side, side, device="meta"), window)
    if stage:
        dim = out // 3
        parts = costs.soft_split_performer(batch, window, view, dim, dim // 2, dim, itemsize)
        backward = parts["backward" if use.startswith("image") else "backward with input"]
        return {"forward": parts["forward"], "training": parts["forward"] + backward}
    parts = costs.soft_split_linear(batch, window, view, out, itemsize, norm)
    training = parts["forward, training"] + parts["backward weight"]
    return {
        "forward": parts["forward"],
        "training": training if use.startswith("image") else training + parts["backward input"],
    }


def table_of(result: dict[str, Any]) -> Table:
    """Work and floor of every use, then each variant's time over the floor."""
    table = Table("use", "variant", "GFLOP", "MB", "forward", "over floor", "GFLOP", "MB", "training", "over floor")
    for use, parts in result["work"].items():
        numbers = [f"{parts[p][key] / scale:.1f}" for p in parts for key, scale in (("flops", 1e9), ("bytes", 1e6))]
        floor = [f"{parts[p]['floor_s'] * 1e6:.0f} µs" if "floor_s" in parts[p] else "not measured" for p in parts]
        table.add_row(use, "floor", *numbers[:2], floor[0], "", *numbers[2:], floor[1], "")
        for row in (row for row in result["rows"] if row["use"] == use):
            cells = [use, row["variant"]]
            for part in parts:
                seconds = row.get(f"{part}_s")
                cells += ["", "", f"{seconds * 1e6:.0f} µs" if seconds else f"wrong: {row['error']:.1e}"]
                cells.append(f"{seconds / parts[part]['floor_s']:.2f}" if seconds else "")
            table.add_row(*cells)
    return table


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=positive_int, default=128, help="images (default: 128)")
    parser.add_argument("--dtype", choices=TOLERANCE, default="bfloat16", help="default: bfloat16")
    parser.add_argument("--output", type=Path, help="result file or folder (default: benchmarks/results/local)")
    args = parser.parse_args(argv)
    dtype, date = getattr(torch, args.dtype), datetime.datetime.now()
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else platform.processor() or "cpu"
    try:
        env = collect_env()
        path = result_path(args.output, f"kernels-{device}", env, date)
        result: dict[str, Any] = {"command": sys.argv, "date": date.isoformat(), "environment": env}
        result["work"] = {
            use: {part: dataclasses.asdict(cost) for part, cost in work(use, args.batch_size, dtype.itemsize).items()}
            for use in USES
        }
        result["rows"] = []
        if on_gpu:
            torch.set_float32_matmul_precision("high")
            rates = result["bytes_per_second"], result["flops_per_second"] = ceilings(dtype)
            for parts in result["work"].values():
                for part in parts.values():
                    part["floor_s"] = costs.Cost(part["flops"], part["bytes"]).floor(*rates)
            for use in track(USES, "measuring", console=Console(stderr=True)):
                result["rows"] += measure(use, args.batch_size, dtype)
        Console(width=160).print(table_of(result))
        if on_gpu:
            write_json(path, result)
            print(f"written to {path}")
        else:
            print("no GPU: nothing was measured, nothing was written")
    except UsageError as error:
        parser.error(str(error))
    return 0 if all(row["passed"] for row in result["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
