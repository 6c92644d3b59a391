"""Sample arguments of every public op, by name, for tests and benchmarks.

    sample = make("mlp", Sizes(tokens=50, channels=64), torch.bfloat16)
    ops.mlp(**sample)

Weights are scaled as layers initialise them, so that results have values around 1 at any size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from t2t_fast.ops.soft_splits.arguments import Geometry

Sample = dict[str, Any]
_WINDOWS = Geometry(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))


@dataclass(frozen=True)
class Sizes:
    """Sizes of a call; each op reads those that it has. Small and odd by default, to leave remainders."""

    batch: int = 2
    tokens: int = 19
    channels: int = 20  # C, of the tokens or of the image
    out: int = 23  # rows of the weight of linear, layer_norm_linear and soft_split_linear
    hidden: int = 37  # of an MLP
    reduced: int = 3  # R, of a gate
    heads: int = 3
    dim: int = 24  # E, of a head and of the Performer's tokens
    features: int = 11  # m, of the Performer
    grid: tuple[int, int] = (9, 8)  # rows and columns of the image
    as_tokens: bool = False  # whether the image is given as tokens (B, rows * columns, C)
    geometry: Geometry = _WINDOWS

    @property
    def window(self) -> int:
        """C*kh*kw, the values of a window."""
        height, width = self.geometry.kernel_size
        return self.channels * height * width


SMALL = Sizes()
# t2t_vit_14 at 224 px: its three soft splits, the layer behind the first, and its blocks.
_STAGE = Sizes(channels=64, as_tokens=True, tokens=3136, heads=1, dim=64, features=32, hidden=64, out=192)
_FIRST = replace(_STAGE, channels=3, as_tokens=False, geometry=Geometry((7, 7), (4, 4), (2, 2)))
T2T_VIT_14 = {
    "image to 192": replace(_FIRST, grid=(224, 224)),
    "tokens to 192": replace(_STAGE, grid=(56, 56)),
    "tokens to 384": replace(_STAGE, grid=(28, 28), out=384),
    "3136 tokens": _STAGE,
    "784 tokens": replace(_STAGE, tokens=784),
    "197 tokens": Sizes(tokens=197, heads=6, dim=64, channels=384, out=1152, hidden=1152, reduced=24),
}


@dataclass(frozen=True)
class Draw:
    """Draws the parts of a sample, in ``dtype``, from float32 random numbers."""

    dtype: torch.dtype
    device: torch.device | str | None
    generator: torch.Generator | None

    def normal(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator, device=self.device)
        return (scale * values + shift).to(self.dtype)

    def matrix(self, rows: int, columns: int) -> Tensor:
        return self.normal(rows, columns, scale=columns**-0.5)

    def linear(self, prefix: str, rows: int, columns: int) -> Sample:
        return {f"{prefix}weight": self.matrix(rows, columns), f"{prefix}bias": self.normal(rows)}

    def norm(self, prefix: str, width: int) -> Sample:
        gamma, beta = self.normal(width, scale=0.2, shift=1.0), self.normal(width, scale=0.2)
        return {f"{prefix}weight": gamma, f"{prefix}bias": beta}

    def gate(self, sizes: Sizes) -> Sample:
        reduced, channels = sizes.reduced, sizes.channels
        return {"w_reduce": self.matrix(reduced, channels), "w_expand": self.matrix(channels, reduced)}

    def image(self, sizes: Sizes) -> Tensor:
        rows, columns = sizes.grid
        if sizes.as_tokens:
            return self.normal(sizes.batch, rows * columns, sizes.channels)
        return self.normal(sizes.batch, sizes.channels, rows, columns)

    def features(self, sizes: Sizes) -> Tensor:
        """Orthogonal rows of norm sqrt(m), as the models draw them."""
        rows = torch.empty(sizes.features, sizes.dim, device=self.device)
        return (torch.nn.init.orthogonal_(rows, generator=self.generator) * sizes.features**0.5).to(self.dtype)

    def layer(self, norm: str, sizes: Sizes) -> Sample:
        """The weights of a token layer behind its first Linear."""
        return {
            "w": self.features(sizes),
            **self.linear("proj_", sizes.dim, sizes.dim),
            **self.norm(norm, sizes.dim),
            **self.linear("fc1_", sizes.hidden, sizes.dim),
            **self.linear("fc2_", sizes.dim, sizes.hidden),
        }


def _geometry(s: Sizes) -> Sample:
    return {**s.geometry._asdict(), "grid": s.grid if s.as_tokens else None}


def _attention(draw: Draw, s: Sizes) -> Sample:
    """Queries, keys and values are views of one tensor, as in the models."""
    q, k, v = draw.normal(s.batch, s.tokens, 3, s.heads, s.dim).permute(2, 0, 3, 1, 4)
    return {"q": q, "k": k, "v": v, "scale": s.dim**-0.5}


def _performer_attention(draw: Draw, s: Sizes) -> Sample:
    k, q, v = draw.normal(s.batch, s.tokens, 3 * s.dim, scale=0.7).chunk(3, -1)
    return {"k": k, "q": q, "v": v, "w": draw.features(s)}


def _linear(draw: Draw, s: Sizes) -> Sample:
    return {"x": draw.normal(s.batch, s.tokens, s.channels), **draw.linear("", s.out, s.channels)}


def _mlp(draw: Draw, s: Sizes) -> Sample:
    fc1, fc2 = draw.linear("fc1_", s.hidden, s.channels), draw.linear("fc2_", s.channels, s.hidden)
    return {"x": draw.normal(s.batch, s.tokens, s.channels), **fc1, **fc2}


def _add_layer_norm(draw: Draw, s: Sizes) -> Sample:
    x, y = (draw.normal(s.batch, s.tokens, s.channels) for _ in "xy")
    return {"x": x, "y": y, **draw.norm("norm_", s.channels)}


def _split(draw: Draw, linear: str, norm: str, out: int, s: Sizes) -> Sample:
    return {"x": draw.image(s), **draw.linear(linear, out, s.window), **draw.norm(norm, s.window)}


# Each op's arguments in the order of its signature, up to its options.
SAMPLES: dict[str, Callable[[Draw, Sizes], Sample]] = {
    "add_layer_norm": _add_layer_norm,
    "attention": _attention,
    "layer_norm_linear": lambda draw, s: {**_linear(draw, s), **draw.norm("norm_", s.channels)},
    "linear": _linear,
    "mlp": _mlp,
    "performer_attention": _performer_attention,
    "se_gate": lambda draw, s: {"x": draw.normal(s.batch, s.tokens, s.channels), **draw.gate(s)},
    "se_mlp": lambda draw, s: {**_mlp(draw, s), **draw.gate(s)},
    "soft_split": lambda draw, s: {"x": draw.image(s), **_geometry(s)},
    "soft_split_linear": lambda draw, s: {**_split(draw, "", "norm_", s.out, s), **_geometry(s)},
    "soft_split_performer": lambda draw, s: {
        **_split(draw, "kqv_", "norm1_", 3 * s.dim, s),
        **draw.layer("norm2_", s),
        **_geometry(s),
    },
    "token_performer": lambda draw, s: {
        "kqv": draw.normal(s.batch, s.tokens, 3 * s.dim, scale=0.7),
        **draw.layer("norm_", s),
    },
}


def make(
    op: str,
    sizes: Sizes = SMALL,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
    *,
    without: Sequence[str] = (),
) -> Sample:
    """Arguments of ``op``; those named in ``without`` are None."""
    return SAMPLES[op](Draw(dtype, device, generator), sizes) | dict.fromkeys(without)


def branch(x: Tensor) -> Sample:
    """A residual of ``x`` and a factor per image, the second image's zero: optional arguments of mlp and the gates."""
    scale = torch.rand(x.shape[0], device=x.device) + 0.5
    scale[1:2] = 0
    return {"residual": torch.randn_like(x), "branch_scale": scale.to(x.dtype)}


def tensors_of(sample: Sample) -> dict[str, Tensor]:
    """The tensors among the arguments. Every op is differentiable by all of them."""
    return {name: value for name, value in sample.items() if isinstance(value, Tensor)}


def learned(sample: Sample) -> list[Tensor]:
    """The tensors that have a gradient when a model is trained: not an image, and not the Performer's features w."""
    not_learned = ("w", "x") if sample.get("grid", ()) is None else ("w",)
    return [tensor for name, tensor in tensors_of(sample).items() if name not in not_learned]
