"""The ops as T2T-ViT-14 uses them, and its tokens-to-token module: tensors, calls, and the minimal work of each."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from t2t_fast import ops
from t2t_fast.bench.common import OP_VARIANTS
from t2t_fast.kernels import costs
from t2t_fast.kernels.costs import Cost
from t2t_fast.kernels.windows import make_view, make_window
from t2t_fast.layers.tokens_to_token import TokensToToken
from t2t_fast.macs import count_macs

Tensors = list[Tensor | None]
# For the relative norm of the worst result or gradient. Wide, as wrong ones are off by far more.
TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 8e-2, torch.float32: 2e-3}


@dataclass(frozen=True)
class Case:
    """One use of an op.

    Attributes:
        op: The op's name, or ``tokens_to_token``.
        use: Name of the use.
        make: Takes a function ``new(*shape, ...)`` that draws one tensor, and a batch size; returns a call's tensors.
        call: Takes a backend and those tensors; returns the result.
        work: Takes a batch size and bytes per value; returns the minimal work of "forward" and "training".
        backends: The op's backends.
    """

    op: str
    use: str
    make: Callable[[Callable[..., Tensor], int], Tensors]
    call: Callable[[str, Tensors], Tensor]
    work: Callable[[int, int], dict[str, Cost]]
    backends: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.op}, {self.use}"


def tensors_of(case: Case, batch: int, dtype: torch.dtype, device: torch.device) -> Tensors:
    """Random tensors for a call; all require a gradient, except those that are never learned."""
    generator = torch.Generator(device).manual_seed(0)

    def make(*shape: int, scale: float = 1.0, shift: float = 0.0, learned: bool = True) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device) * scale + shift
        return values.to(dtype).requires_grad_(learned)

    return case.make(make, batch)


def runners(case: Case) -> dict[str, Callable[[Tensors], Any]]:
    """Each variant that the op has, to a function of the tensors.

    Programs compiled for earlier cases are dropped.
    """

    def run(backend: str) -> Callable[[Tensors], Any]:
        return lambda tensors: case.call(backend, tensors)

    found = {variant: run(variant) for variant in OP_VARIANTS if variant in case.backends}
    torch._dynamo.reset()  # one code object, one recompile limit: reset, or later cases run uncompiled
    return {**found, "reference, compiled": torch.compile(run("reference"), dynamic=False, fullgraph=True)}


def step(function: Callable[[Tensors], Any], tensors: Tensors) -> list[Tensor]:
    """The result, and the gradient of every tensor that requires one, for a fixed random gradient of the result."""
    result = function(tensors)
    results = result if isinstance(result, tuple) else (result,)
    grads = [_noise(index, r.shape, r.dtype, r.device) for index, r in enumerate(results)]  # each its own
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    return [*results, *torch.autograd.grad(results, wanted, grads)]


@functools.lru_cache(maxsize=4)
def _noise(seed: int, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Cached, so that a timed step does not draw it."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def exact_step(case: Case, sample: Tensors) -> list[Tensor]:
    """:func:`step` of the reference in float64."""
    exact = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in sample]
    return step(lambda tensors: case.call("reference", tensors), exact)


def worst_error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Relative norm of the worst result or gradient; infinite where one is not finite."""
    found = [((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True)]
    return max(error if math.isfinite(error) else math.inf for error in found)


def _soft_split(use: str, channels: int, side: int, kernel: int, stride: int, out: int, **kwargs: bool) -> Case:
    padding = 2 if kernel == 7 else 1
    as_tokens, norm, stage = (kwargs.get(name, False) for name in ("as_tokens", "norm", "stage"))
    dim = out // 3
    grid = (side, side) if as_tokens else None

    def make(new: Callable[..., Tensor], batch: int) -> Tensors:
        n = channels * kernel**2
        x = new(batch, side**2, channels) if as_tokens else new(batch, channels, side, side, learned=False)
        tensors: Tensors = [x, new(out, n, scale=n**-0.5), new(out)]
        tensors += [new(n, scale=0.1, shift=1.0), new(n, scale=0.1)] if norm else [None, None]
        if stage:  # w, then proj, norm2 and the MLP
            tensors.append(new(dim // 2, dim, learned=False))
            shapes: list[tuple[int, ...]] = [(dim, dim), (dim,), (dim,), (dim,), (dim, dim), (dim,), (dim, dim), (dim,)]
            tensors += [new(*shape, scale=dim**-0.5) for shape in shapes]
        return tensors

    def call(backend: str, tensors: Tensors) -> Tensor:
        op: Any = ops.soft_split_performer if stage else ops.soft_split_linear
        return op(*tensors, kernel, stride, padding, grid=grid, backend=backend)

    def work(batch: int, itemsize: int) -> dict[str, Cost]:
        window = make_window(channels, (kernel,) * 2, (stride,) * 2, (padding,) * 2, False)
        view = make_view(torch.empty(batch, channels, side, side, device="meta"), window)
        if stage:
            parts = costs.soft_split_performer(batch, window, view, dim, dim // 2, dim, itemsize)
            backward = parts["backward with input" if as_tokens else "backward"]
            return {"forward": parts["forward"], "training": parts["forward"] + backward}
        parts = costs.soft_split_linear(batch, window, view, out, itemsize, norm)
        training = parts["forward, training"] + parts["backward weight"]
        return {"forward": parts["forward"], "training": training + parts["backward input"] if as_tokens else training}

    op = "soft_split_performer" if stage else "soft_split_linear"
    return Case(op, use, make, call, work, ("reference", "aten", "triton"))


def _work(flops: int, read: int, written: int) -> Callable[[int, int], dict[str, Cost]]:
    """The work of a batch, from one image's operations and values. Backward has two matmuls for each of forward's.

    It reads the inputs again and the gradient of the result, and writes the gradients of the inputs.
    """

    def work(batch: int, itemsize: int) -> dict[str, Cost]:
        forward = Cost(batch * flops, batch * (read + written) * itemsize)
        return {"forward": forward, "training": Cost(3 * batch * flops, batch * (3 * read + 2 * written) * itemsize)}

    return work


def _tokens_to_token(model: str, tokens_type: str) -> Case:
    """The module of that model, without dropout, as a function of the image and the parameters."""
    backends = ("reference", "auto")
    with torch.device("meta"):
        modules = {b: TokensToToken(embed_dim=C, tokens_type=tokens_type, backend=b).eval() for b in backends}
    given = dict(modules["auto"].named_parameters())

    def make(new: Callable[..., Tensor], batch: int) -> Tensors:
        tensors: Tensors = [new(batch, 3, 224, 224, learned=False)]
        for name, parameter in given.items():
            learned, is_vector = parameter.requires_grad, parameter.ndim == 1
            scale = 0.1 if is_vector else parameter.shape[1] ** -0.5 if learned else 1.0
            shift = float(is_vector and name.endswith("weight"))  # of a LayerNorm
            tensors.append(new(*parameter.shape, scale=scale, shift=shift, learned=learned))
        return tensors

    def call(backend: str, tensors: Tensors) -> Tensor:
        image, *parameters = tensors
        result: Tensor = functional_call(modules[backend], dict(zip(given, parameters, strict=True)), (image,))  # type: ignore[arg-type]
        return result

    def work(batch: int, itemsize: int) -> dict[str, Cost]:
        flops, image, tokens = 2 * count_macs(modules["reference"], 224).macs, 3 * 224**2, (N - 1) * C
        training = 3 * flops - 2 * 3136 * 147 * 192  # the image requires no gradient
        return {
            "forward": Cost(batch * flops, batch * (image + tokens) * itemsize),
            "training": Cost(batch * training, batch * 2 * (image + tokens) * itemsize),
        }

    return Case("tokens_to_token", model, make, call, work, backends)


def _simple(
    op: str,
    use: str,
    shapes: list[tuple[int, ...]],
    work: Callable[[int, int], dict[str, Cost]],
    backends: tuple[str, ...],
    call: Callable[..., Any],
    fixed: tuple[int, ...] = (),
) -> Case:
    """A case of tensors with these shapes, -1 for the batch; those at ``fixed`` are not learned."""

    def make(new: Callable[..., Tensor], batch: int) -> Tensors:
        tensors: Tensors = []
        for index, shape in enumerate(shapes):
            scale = 1.0 if shape[0] < 0 or index in fixed else shape[1] ** -0.5 if len(shape) > 1 else 0.1
            size = (batch, *shape[1:]) if shape[0] < 0 else shape
            tensors.append(new(*size, scale=scale, learned=index not in fixed))
        return tensors

    return Case(op, use, make, lambda backend, tensors: call(*tensors, backend=backend), work, backends)


def _performer(*tensors: Any, backend: str) -> Tensor:
    kqv, w = tensors
    k, q, v = kqv.chunk(3, dim=-1)
    return ops.performer_attention(k, q, v, w, backend=backend)


def _attention(*tensors: Any, backend: str) -> Tensor:
    (qkv,) = tensors
    heads = 6 if qkv.shape[1] < 1000 else 1
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
    return ops.attention(q, k, v, 0.125, backend=backend)


def _gelu_linear(*tensors: Any, backend: str) -> Tensor:
    return ops.linear(*tensors, gelu=True, backend=backend)


N, C, H = 197, 384, 1152
_LIBRARY = ("reference", "aten")
_TRITON, _NATIVE = (*_LIBRARY, "triton"), (*_LIBRARY, "native")
CASES = (
    _soft_split("image to 192", 3, 224, 7, 4, 192, norm=True),
    _soft_split("tokens to 192", 64, 56, 3, 2, 192, as_tokens=True, norm=True),
    _soft_split("tokens to 384", 64, 28, 3, 2, 384, as_tokens=True),
    _soft_split("image, whole stage", 3, 224, 7, 4, 192, norm=True, stage=True),
    _soft_split("tokens, whole stage", 64, 56, 3, 2, 192, as_tokens=True, norm=True, stage=True),
    _simple("performer_attention", "3136 tokens", [(-1, 3136, 192), (32, 64)],
            _work(2 * 3136 * 32 * 64 * 4, 3136 * 192, 3136 * 64), _TRITON, _performer, (1,)),
    _simple("layer_norm_linear", "384 to 1152", [(-1, N, C), (H, C), (H,), (C,), (C,)],
            _work(2 * N * C * H, N * C, N * H), _LIBRARY, ops.layer_norm_linear),
    _simple("linear", "384 to 1152, gelu", [(-1, N, C), (H, C), (H,)],
            _work(2 * N * C * H, N * C, N * H), _LIBRARY, _gelu_linear),
    _simple("mlp", "384, hidden 1152", [(-1, N, C), (H, C), (H,), (C, H), (C,)],
            _work(4 * N * C * H, N * C, N * C), _LIBRARY, ops.mlp),
    _simple("add_layer_norm", "384", [(-1, N, C), (-1, N, C), (C,), (C,)],
            _work(0, 2 * N * C, 2 * N * C), _TRITON, ops.add_layer_norm),
    _simple("attention", "6 heads, 197 tokens", [(-1, N, 3 * C)],
            _work(4 * N * N * C, 3 * N * C, N * C), _LIBRARY, _attention),
    _simple("attention", "1 head, 3136 tokens", [(-1, 3136, 192)],
            _work(4 * 3136 * 3136 * 64, 3 * 3136 * 64, 3136 * 64), _LIBRARY, _attention),
    _simple("se_gate", "384", [(-1, N, C), (C // 16, C), (C, C // 16)],
            _work(0, N * C, N * C), _NATIVE, ops.se_gate),
    _simple("se_mlp", "384, hidden 1152", [(-1, N, C), (H, C), (H,), (C, H), (C,), (C // 16, C), (C, C // 16)],
            _work(4 * N * C * H, N * C, N * C), _NATIVE, ops.se_mlp),
    _simple("se_mlp", "64, hidden 64", [(-1, N, 64), (64, 64), (64,), (64, 64), (64,), (4, 64), (64, 4)],
            _work(4 * N * 64 * 64, N * 64, N * 64), _NATIVE, ops.se_mlp),
    _tokens_to_token("t2t_vit_14", "performer"),
    _tokens_to_token("t2t_vit_t_14", "transformer"),
)  # fmt: skip
