"""The ops as T2T-ViT-14 uses them, and its tokens-to-token module: arguments, calls, and the minimal work of each."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from t2t_fast import ops
from t2t_fast.bench.common import OP_VARIANTS
from t2t_fast.bench.samples import SAMPLES, T2T_VIT_14, Draw, Sample, Sizes, learned, tensors_of
from t2t_fast.kernels import costs
from t2t_fast.kernels.costs import Cost
from t2t_fast.kernels.windows import make_view, make_window
from t2t_fast.layers.tokens_to_token import TokensToToken
from t2t_fast.macs import count_macs

# For the relative norm of the worst result or gradient. Wide, as wrong ones are off by far more.
TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 8e-2, torch.float32: 2e-3}


@dataclass(frozen=True)
class Case:
    """One use of an op.

    Attributes:
        op: The op's name, or ``tokens_to_token``.
        use: Name of the use.
        make: Takes a batch size and what draws; returns a call's arguments, the learned tensors requiring a gradient.
        call: Takes a backend and those arguments; returns the result.
        work: Takes a batch size and bytes per value; returns the minimal work of "forward" and "training".
        backends: The op's backends.
    """

    op: str
    use: str
    make: Callable[[int, Draw], Sample]
    call: Callable[[str, Sample], Tensor]
    work: Callable[[int, int], dict[str, Cost]]
    backends: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.op}, {self.use}"


def sample_of(case: Case, batch: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """Arguments of a call, the same ones every time."""
    return case.make(batch, Draw(dtype, device, torch.Generator(device).manual_seed(0)))


def runners(case: Case) -> dict[str, Callable[[Sample], Any]]:
    """Each variant that the op has, to a function of a call's arguments.

    Programs compiled for earlier cases are dropped.
    """

    def run(backend: str) -> Callable[[Sample], Any]:
        return lambda sample: case.call(backend, sample)

    found = {variant: run(variant) for variant in OP_VARIANTS if variant in case.backends}
    torch._dynamo.reset()  # one code object, one recompile limit: reset, or later cases run uncompiled
    return {**found, "reference, compiled": torch.compile(run("reference"), dynamic=False, fullgraph=True)}


def step(function: Callable[[Sample], Any], sample: Sample) -> list[Tensor]:
    """The result, and the gradient of every tensor that requires one, for a fixed random gradient of the result."""
    result = function(sample)
    results = result if isinstance(result, tuple) else (result,)
    grads = [_noise(index, r.shape, r.dtype, r.device) for index, r in enumerate(results)]  # each its own
    wanted = [t for t in tensors_of(sample).values() if t.requires_grad]
    return [*results, *torch.autograd.grad(results, wanted, grads)]


@functools.lru_cache(maxsize=4)
def _noise(seed: int, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Cached, so that a timed step does not draw it."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def exact_step(case: Case, sample: Sample) -> list[Tensor]:
    """:func:`step` of the reference in float64."""
    tensors = tensors_of(sample).items()
    exact = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in tensors}
    return step(lambda given: case.call("reference", given), sample | exact)


def worst_error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Relative norm of the worst result or gradient; infinite where one is not finite."""
    found = [((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True)]
    return max(error if math.isfinite(error) else math.inf for error in found)


def _op(
    op: str,
    use: str,
    work: Callable[[int, int], dict[str, Cost]],
    own: str | None = None,
    *,
    sizes: Sizes = T2T_VIT_14["197 tokens"],
    without: Sequence[str] = (),
    **options: Any,
) -> Case:
    """A case of a public op with arguments of these sizes, those named in ``without`` None; ``own``: our backend."""
    function: Callable[..., Tensor] = getattr(ops, op)

    def make(batch: int, draw: Draw) -> Sample:
        sample = SAMPLES[op](draw, replace(sizes, batch=batch)) | dict.fromkeys(without)
        for tensor in learned(sample):
            tensor.requires_grad_()
        return sample

    def call(backend: str, sample: Sample) -> Tensor:
        return function(**sample, **options, backend=backend)

    return Case(op, use, make, call, work, ("reference", "aten", *([own] if own else [])))


def _as_one(case: Case, names: str) -> Case:
    """The case with its queries, keys and values in one tensor (B, N, 3, ...), as one Linear makes them."""

    def tokens_first(t: Tensor) -> Tensor:
        return t.transpose(1, 2) if t.ndim == 4 else t  # (B, heads, N, E)

    def make(batch: int, draw: Draw) -> Sample:
        sample = case.make(batch, draw)
        parts = [tokens_first(sample.pop(name)).detach() for name in names]
        return {"whole": torch.stack(parts, 2).requires_grad_(), **sample}

    def call(backend: str, sample: Sample) -> Tensor:
        parts = map(tokens_first, sample["whole"].unbind(2))
        rest = {name: value for name, value in sample.items() if name != "whole"}
        return case.call(backend, dict(zip(names, parts, strict=True)) | rest)

    return replace(case, make=make, call=call)


def _soft_split(op: str, use: str, name: str, without: Sequence[str] = ()) -> Case:
    """soft_split_linear, or a whole stage with soft_split_performer, at the sizes of that name."""
    sizes = T2T_VIT_14[name]

    def work(batch: int, itemsize: int) -> dict[str, Cost]:
        window = make_window(sizes.channels, *sizes.geometry, channels_last=False)
        view = make_view(torch.empty(batch, sizes.channels, *sizes.grid, device="meta"), window)
        if op == "soft_split_performer":
            dims = sizes.dim, sizes.features, sizes.hidden
            parts = costs.soft_split_performer(batch, window, view, *dims, itemsize)
            backward = parts["backward with input" if sizes.as_tokens else "backward"]
            return {"forward": parts["forward"], "training": parts["forward"] + backward}
        parts = costs.soft_split_linear(batch, window, view, sizes.out, itemsize, norm=not without)
        training = parts["forward, training"] + parts["backward weight"]
        if sizes.as_tokens:
            training += parts["backward input"]
        return {"forward": parts["forward"], "training": training}

    return _op(op, use, work, "triton", sizes=sizes, without=without)


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

    def make(batch: int, draw: Draw) -> Sample:
        sample = {"image": draw.normal(batch, 3, 224, 224)}
        for name, parameter in given.items():
            learned, is_vector = parameter.requires_grad, parameter.ndim == 1
            scale = 0.1 if is_vector else parameter.shape[1] ** -0.5 if learned else 1.0
            shift = float(is_vector and name.endswith("weight"))  # of a LayerNorm
            sample[name] = draw.normal(*parameter.shape, scale=scale, shift=shift).requires_grad_(learned)
        return sample

    def call(backend: str, sample: Sample) -> Tensor:
        result: Tensor = functional_call(modules[backend], {name: sample[name] for name in given}, (sample["image"],))
        return result

    def work(batch: int, itemsize: int) -> dict[str, Cost]:
        flops, image, tokens = 2 * count_macs(modules["reference"], 224).macs, 3 * 224**2, (N - 1) * C
        training = 3 * flops - 2 * 3136 * 147 * 192  # the image requires no gradient
        return {
            "forward": Cost(batch * flops, batch * (image + tokens) * itemsize),
            "training": Cost(batch * training, batch * 2 * (image + tokens) * itemsize),
        }

    return Case("tokens_to_token", model, make, call, work, backends)


N, C, H = 197, 384, 1152
CASES = (
    _soft_split("soft_split_linear", "image to 192", "image to 192"),
    _soft_split("soft_split_linear", "tokens to 192", "tokens to 192"),
    _soft_split("soft_split_linear", "tokens to 384", "tokens to 384", without=("norm_weight", "norm_bias")),
    _soft_split("soft_split_performer", "image, whole stage", "image to 192"),
    _soft_split("soft_split_performer", "tokens, whole stage", "tokens to 192"),
    _as_one(_op("performer_attention", "3136 tokens", _work(2 * 3136 * 32 * 64 * 4, 3136 * 192, 3136 * 64), "triton",
                sizes=T2T_VIT_14["3136 tokens"]), "kqv"),
    _op("layer_norm_linear", "384 to 1152", _work(2 * N * C * H, N * C, N * H)),
    _op("linear", "384 to 1152, gelu", _work(2 * N * C * H, N * C, N * H), gelu=True),
    _op("mlp", "384, hidden 1152", _work(4 * N * C * H, N * C, N * C)),
    _op("add_layer_norm", "384", _work(0, 2 * N * C, 2 * N * C), "triton"),
    _as_one(_op("attention", "6 heads, 197 tokens", _work(4 * N * N * C, 3 * N * C, N * C)), "qkv"),
    _as_one(_op("attention", "1 head, 3136 tokens", _work(4 * 3136 * 3136 * 64, 3 * 3136 * 64, 3136 * 64),
                sizes=T2T_VIT_14["3136 tokens"]), "qkv"),
    _op("se_gate", "384", _work(0, N * C, N * C), "native"),
    _op("se_mlp", "384, hidden 1152", _work(4 * N * C * H, N * C, N * C), "native"),
    _op("se_mlp", "64, hidden 64", _work(4 * N * 64 * 64, N * 64, N * 64), "native",
        sizes=Sizes(tokens=N, channels=64, hidden=64, reduced=4)),
    _tokens_to_token("t2t_vit_14", "performer"),
    _tokens_to_token("t2t_vit_t_14", "transformer"),
)  # fmt: skip
