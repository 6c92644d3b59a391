"""Compare the emulated CUDA passes and the CPU's own, both under the sanitizers, with the reference in float64.

Run by tests/test_cuda_emulation.py in a process of its own: ``check.py LIBRARY [quick]``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers import TOLERANCES, assert_close, rounding_moves  # noqa: E402

from t2t_fast.ops.block.arguments import MlpWeights  # noqa: E402
from t2t_fast.ops.common.branch import Branch  # noqa: E402
from t2t_fast.ops.se import reference  # noqa: E402
from t2t_fast.ops.se.arguments import GateWeights  # noqa: E402

# (images, tokens, channels, hidden, reduced): one of each, tails, misaligned rows, several tiles, no image at all
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 9, 20, 37, 3),
    (3, 33, 64, 64, 4),
    (2, 5, 65, 130, 2),
    (1, 7, 300, 520, 9),
    (0, 5, 8, 16, 2),
]
PAIRS = [(t, t) for t in TOLERANCES] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]


def leaves(shape: tuple[int, ...], dtype: torch.dtype, out: torch.dtype, bias: bool) -> list[Tensor | None]:
    """Tokens and weights, the residual and the scale, as the operator takes them."""
    images, tokens, channels, hidden, reduced = shape
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        torch.randn(images, tokens, channels).to(dtype),
        (torch.randn(hidden, channels) / math.sqrt(channels)).to(dtype),
        torch.randn(hidden).to(acc) if bias else None,
        (torch.randn(channels, hidden) / math.sqrt(hidden)).to(dtype),
        torch.randn(channels).to(acc) if bias else None,
        (torch.randn(reduced, channels) / math.sqrt(channels)).to(acc),
        (torch.randn(channels, reduced) / math.sqrt(reduced)).to(acc),
        torch.randn(images, tokens, channels).to(out) if bias else None,
        (torch.rand(images) * 2).to(acc) if bias else None,
    ]


def double(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def exact_gradients(function: object, grad: Tensor, tensors: list[Tensor | None]) -> list[Tensor | None]:
    """Autograd's, of the reference in float64."""
    inputs = [None if t is None else t.requires_grad_() for t in double(tensors)]
    wanted = [t for t in inputs if t is not None]
    found = iter(torch.autograd.grad(function(*inputs), wanted, grad.double()))
    return [None if t is None else next(found) for t in inputs]


def exact_mlp(x: Tensor, *rest: Tensor | None) -> Tensor:
    *weights, w_reduce, w_expand, residual, scale = rest
    return reference.se_mlp(x, MlpWeights(*weights), GateWeights(w_reduce, w_expand), Branch(residual, scale))


def exact_gate(x: Tensor, w_reduce: Tensor, w_expand: Tensor, residual: Tensor | None, scale: Tensor | None) -> Tensor:
    return reference.se_gate(x, GateWeights(w_reduce, w_expand), Branch(residual, scale))


def cases(quick: bool) -> Iterator[tuple[tuple[int, ...], torch.dtype, torch.dtype]]:
    """All shapes, each with half of the dtypes; or a few in float32."""
    for i, shape in enumerate(SHAPES[1:4] if quick else SHAPES):
        for dtype, out in PAIRS[1:2] if quick else PAIRS[i % 2 :: 2]:
            yield shape, dtype, out


def run_mlp(library: object, grad: Tensor, tensors: list[Tensor | None]) -> tuple[Tensor, list[Tensor | None]]:
    output, *kept = library.se_mlp(*tensors, True)
    assert torch.equal(library.se_mlp(*tensors, False)[0], output)
    *found, d_scale = library.se_mlp_backward(grad, *tensors[:7], tensors[8], *kept)
    return output, [*found, None, d_scale]


def run_gate(library: object, grad: Tensor, tensors: list[Tensor | None]) -> tuple[Tensor, list[Tensor | None]]:
    output, *kept = library.se_gate(*tensors)
    *found, d_scale = library.se_gate_backward(grad, tensors[0], *kept, tensors[1], tensors[2], tensors[4])
    return output, [*found, None, d_scale]


def check(library: object, ways: list[tuple[bool, int]], number: int, case: tuple[tuple[int, ...], Any, Any]) -> None:
    """Both operators at one shape, on the CPU and emulated in several orders."""
    torch.manual_seed(number)
    (shape, dtype, out), bias = case, number % 2 == 0
    whole = leaves(shape, dtype, out, bias)
    small = [whole[0], *whole[5:]]
    grad = torch.randn(shape[:3]).to(out if bias else dtype)
    for function, run, tensors in ((exact_mlp, run_mlp, whole), (exact_gate, run_gate, small)):
        want = function(*double(tensors))
        wanted = exact_gradients(function, grad, tensors)
        moves = rounding_moves(lambda *t, f=function: exact_gradients(f, grad, list(t)), double(tensors), dtype)
        for emulate, order in ways:
            library.emulate(emulate)
            library.order(order)
            output, found = run(library, grad, tensors)
            reduction = shape[1] * shape[3]
            assert_close(output, want, dtype, reduction)
            for got, exact, conditioning in zip(found, wanted, moves, strict=True):
                if got is not None and exact is not None:
                    assert_close(got, exact, dtype, 2 * reduction, grad=True, conditioning=conditioning)


def main() -> None:
    torch.ops.load_library(sys.argv[1])
    quick = "quick" in sys.argv
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills memory that nobody has written to with NaN
    assert torch.empty(3).isnan().all()
    ways = [(True, 0), (True, 1), (True, 2)] + ([] if quick else [(False, 0)])
    for number, case in enumerate(cases(quick)):
        check(torch.ops.t2t_fast_emulated, ways, number, case)
    print("all agree")


main()
