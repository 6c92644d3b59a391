"""What the op tests share: the table of tolerances, comparisons with float64, and gradient checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from t2t_fast import ops
from t2t_fast.bench.samples import Sample, tensors_of
from t2t_fast.ops.common import extension


@dataclass(frozen=True)
class Tolerance:
    """Allowed relative error in the Frobenius norm, of values and of gradients, and the dtype's unit roundoff."""

    value: float
    grad: float
    unit: float


TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-13, 1e-12, 2.0**-53),
    torch.float32: Tolerance(2e-6, 1e-5, 2.0**-24),
    torch.float16: Tolerance(2e-3, 4e-3, 2.0**-11),
    torch.bfloat16: Tolerance(1.2e-2, 2.5e-2, 2.0**-8),
}


def assert_close(
    got: Tensor, want: Tensor, dtype: torch.dtype, reduction: int, *, grad: bool = False, conditioning: float = 0.0
) -> None:
    """Compare with a float64 result, by norm and by largest error.

    ``conditioning`` is the relative norm by which rounding the inputs moves the exact result, from
    :func:`rounding_moves`: cancellation in the problem is no fault of an implementation.

    The largest error is bounded by ``8 u (1 + sqrt(reduction))`` times the largest value: rounding errors of a sum of
    ``reduction`` terms grow with its root, and u is the coarser of the result's and the intermediates' roundoff.
    """
    assert got.shape == want.shape
    tolerance = TOLERANCES[dtype]
    got, want = got.detach().double(), want.detach().double()
    assert torch.isfinite(got).all()
    if want.numel() == 0:
        return
    norm, error = want.norm().item(), (got - want).norm().item()
    allowed = tolerance.grad if grad else tolerance.value
    allowed += 4 * conditioning
    assert error <= allowed * norm + 1e-300, f"relative norm {error / max(norm, 1e-300):.2e} > {allowed:.1e}"
    bound = (8 * tolerance.unit * (1 + math.sqrt(reduction)) + 4 * conditioning) * want.abs().max().item()
    assert (got - want).abs().max().item() <= bound + 1e-300, "largest error above the bound of the reduction length"


def rounding_moves(
    function: Callable[..., Sequence[Tensor | None]], args: Sequence[Tensor | None], dtype: torch.dtype
) -> list[float]:
    """By what relative norm each result of ``function`` in float64 moves when every value of ``args`` is rounded.

    The largest of some random roundings: one alone may happen to cancel.
    """
    unit, exact = TOLERANCES[dtype].unit, function(*args)
    largest = [0.0] * len(exact)
    for _ in range(8):
        moved = function(*[None if a is None else a * (1 + unit * (2 * torch.rand_like(a) - 1)) for a in args])
        for i, (a, b) in enumerate(zip(exact, moved, strict=True)):
            if a is not None and b is not None:
                largest[i] = max(largest[i], ((a - b).norm() / a.norm().clamp_min(1e-300)).item())
    return largest


def hand_written(
    forward: Callable[..., Tensor], backward: Callable[..., Any], num_tensors: int
) -> Callable[..., Tensor]:
    """A differentiable function from a reference's ``forward`` and hand-written ``backward``.

    The first ``num_tensors`` arguments are differentiable (or None); the others are passed through.
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Tensor:
            ctx.save_for_backward(*args[:num_tensors])
            ctx.rest = args[num_tensors:]
            return forward(*args)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            grads = backward(grad, *ctx.saved_tensors, *ctx.rest)
            grads = grads if isinstance(grads, tuple) else (grads,)
            return *grads, *[None] * len(ctx.rest)

    return Function.apply


def gradients(function: Callable[..., Tensor], args: Sequence[Any], grad: Tensor) -> list[Tensor | None]:
    """Autograd's gradients of ``function(*args)`` for the tensors in ``args`` that require one, None for others."""
    leaves = [a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in args]
    wanted = [a for a in leaves if isinstance(a, Tensor)]
    found = iter(torch.autograd.grad(function(*leaves), wanted, grad.to(function(*leaves).dtype)))
    return [next(found) if isinstance(a, Tensor) else None for a in leaves]


def function_of(op: str, sample: Sample, *fixed: str, **options: Any) -> tuple[Callable[..., Any], list[Tensor]]:
    """The public ``op`` as a function of the sample's tensors, but those named in ``fixed``; and these tensors."""
    tensors = {name: tensor for name, tensor in tensors_of(sample).items() if name not in fixed}

    def function(*given: Tensor, **more: Any) -> Any:
        return getattr(ops, op)(**sample | dict(zip(tensors, given, strict=True)), **options, **more)

    return function, list(tensors.values())


DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MATMULS = (torch.float32, torch.bfloat16)  # those of the extension


def with_dtypes(backends: Sequence[str], native: Sequence[torch.dtype] = MATMULS) -> list[tuple[str, torch.dtype]]:
    """Each backend with every dtype that it takes: ``native`` for the backend of that name."""
    return [(b, dtype) for b in backends for dtype in DTYPES if b != "native" or dtype in native]


def widest(backend: str) -> torch.dtype:
    """The most precise dtype that a backend takes, of those whose matmuls the extension has."""
    return torch.float32 if backend == "native" else torch.float64


def skip_unless_possible(backend: str, *dtypes: torch.dtype) -> None:
    """Skip what the interpreter, which stands in for a GPU, cannot do, and what this build of the extension cannot."""
    if backend == "triton" and torch.bfloat16 in dtypes and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly: needs a GPU")
    if backend == "native":
        if torch.empty(0).device.type != "cpu":
            pytest.skip("the extension's matmuls are for the CPU")
        for reason in (extension.why_not_loaded, *map(extension.why_not_multiply, dtypes)):
            if reason is not None:
                pytest.skip(reason)


def leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    """Float64 copies that require a gradient, for gradcheck."""
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]
