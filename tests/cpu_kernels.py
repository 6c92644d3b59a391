"""What the tests of the extension's attention, Performer layer and soft split on the CPU share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import MATMULS, function_of, skip_unless_possible
from torch import Tensor

from t2t_fast import ops
from t2t_fast.bench import samples
from t2t_fast.bench.samples import Sizes

DIFFERENTIABLE = ("attention", "token_performer")
OPS = (*DIFFERENTIABLE, "soft_split_linear")
NATIVE = {"backend": "native"}


def skip_unless_native_runs(request: pytest.FixtureRequest) -> None:
    """Skip a test whose ``dtype`` this build of the extension does not multiply; for an autouse fixture."""
    callspec = getattr(request.node, "callspec", None)
    dtype = callspec.params.get("dtype") if callspec else None
    skip_unless_possible("native", torch.float32, *([dtype] if dtype in MATMULS else []))


def make(op: str, sizes: Sizes = samples.SMALL, dtype: torch.dtype = torch.float32) -> tuple[Any, list[Tensor]]:
    """The op as a function of its tensors, and these."""
    return function_of(op, samples.make(op, sizes, dtype))


def step(function: Callable[..., Tensor], tensors: Sequence[Tensor], backend: str = "native") -> list[Tensor]:
    """The result; and the gradients of a weighted sum of it, by all tensors, unless it is the soft split's."""
    if tensors[0].ndim == 4 and tensors[1].ndim == 2:
        return [function(*tensors, backend=backend)]
    every = [t.detach().requires_grad_() for t in tensors]
    y = function(*every, backend=backend)
    return [y, *torch.autograd.grad(y, every, weights_for(y))]


def weights_for(y: Tensor) -> Tensor:
    """A gradient, the same one for all results of a shape."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).bfloat16().to(y.dtype)


def attention(batch: int, heads: int, queries: int, keys: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values."""
    return [torch.randn(batch, heads, n, dim).to(dtype) for n in (queries, keys, keys)]


def attend(scale: float) -> Callable[..., Tensor]:
    return lambda q, k, v, **backend: ops.attention(q, k, v, scale, **backend)
