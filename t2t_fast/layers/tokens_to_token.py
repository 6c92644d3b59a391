"""The tokens-to-token module: image to backbone tokens in three soft splits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.types import Device

from ..checks import check_alike, check_tensor, factory_options
from ..dispatch import resolve_backend
from ..ops.soft_splits import output_grid
from .plain import is_plain_weight
from .split import split_linear
from .token_performer import TokenPerformer
from .token_transformer import TokenTransformer

torch.fx.wrap("check_images")

TOKENS_TYPES = ("performer", "transformer", "convolution")
# Kernel size, stride and padding of the soft splits.
_FIRST = (7, 4, 2)
_LATER = (3, 2, 1)

# Pixels whose intermediates stay in a CPU's cache, and below the size from which the allocator returns memory to the
# system after each use: measured best of 1, 2, 4, 8 and 16 images at 224 px.
_CHUNK_PIXELS = 4 * 224**2


class TokensToToken(nn.Module):
    """Three soft splits (k7 s4 p2; k3 s2 p1; k3 s2 p1) with a token layer after the first two (paper §3.1, Fig. 2).

    Args:
        in_chans: Channels of the image.
        embed_dim: Width of the tokens made.
        token_dim: Width of the tokens in between.
        tokens_type: ``"performer"``, ``"transformer"``, or ``"convolution"`` (three plain convolutions in place of
            splits and layers: the paper's comparison).
        drop_rate: Dropout inside Performer token layers.
        backend: Passed to the ops.
        device: Where the parameters are made.
        dtype: Their floating-point type; None for torch's default.

    Raises:
        ValueError: Unknown ``tokens_type``, or a ``token_dim`` without random features.
    """

    attention1: TokenPerformer | TokenTransformer
    attention2: TokenPerformer | TokenTransformer
    project: nn.Linear | nn.Conv2d

    def __init__(
        self,
        in_chans: int = 3,
        embed_dim: int = 768,
        token_dim: int = 64,
        tokens_type: str = "performer",
        drop_rate: float = 0.1,
        backend: str = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options = factory_options(device, dtype)
        if tokens_type not in TOKENS_TYPES:
            raise ValueError(f"tokens_type={tokens_type!r} is unknown; accepted: {', '.join(TOKENS_TYPES)}")
        self.in_chans, self.token_dim, self.tokens_type, self.backend = in_chans, token_dim, tokens_type, backend
        if tokens_type == "convolution":
            self.soft_split0 = nn.Conv2d(in_chans, token_dim, *_FIRST, **options)
            self.soft_split1 = nn.Conv2d(token_dim, token_dim, *_LATER, **options)
            self.project = nn.Conv2d(token_dim, embed_dim, *_LATER, **options)
            return
        if tokens_type == "performer":
            layer: dict[str, Any] = {"drop_rate": drop_rate, "backend": backend, **options}
            self.attention1 = TokenPerformer(in_chans, token_dim, *_FIRST, **layer)
            self.attention2 = TokenPerformer(token_dim, token_dim, *_LATER, **layer)
        else:
            layer = {"backend": backend, **options}
            self.attention1 = TokenTransformer(in_chans, token_dim, *_FIRST, **layer)
            self.attention2 = TokenTransformer(token_dim, token_dim, *_LATER, **layer)
        self.project = nn.Linear(token_dim * _LATER[0] ** 2, embed_dim, **options)

    @staticmethod
    def grids(height: int, width: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """The token grids (h, w) after the first, second and third soft split of an image of that size."""
        first = output_grid((height, width), *_FIRST)
        second = output_grid(first, *_LATER)
        return first, second, output_grid(second, *_LATER)

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, C, H, W) to tokens (B, L, embed_dim), row by row over ``grids(H, W)[2]``.

        Raises:
            TypeError: ``x`` is no floating-point tensor, or has another dtype than the weights outside autocast.
            ValueError: ``x`` has another number of dimensions or channels, or is too small for the first window.
        """
        check_images(x, self.in_chans, self._first_weight() if isinstance(x, Tensor) else None)
        images = None if self.tokens_type == "convolution" else _chunk(x, self.backend)
        if images is None or images >= x.shape[0]:
            return self._forward(x)
        return torch.cat([self._forward(chunk) for chunk in x.split(images)])

    def _first_weight(self) -> Tensor | None:
        """The weight of the first Linear or convolution; None if another kind of module took its place."""
        layer: Any = self.soft_split0 if self.tokens_type == "convolution" else self.attention1
        linear = getattr(layer, "kqv", None) or getattr(getattr(layer, "attn", None), "qkv", layer)
        if type(linear) not in (nn.Linear, nn.Conv2d):
            return None
        weight = linear._parameters.get("weight")
        return weight if weight is not None and is_plain_weight(weight) else None

    def _forward(self, x: Tensor) -> Tensor:
        if self.tokens_type == "convolution":
            return self.project(self.soft_split1(self.soft_split0(x))).flatten(2).transpose(1, 2)
        first, second, _ = self.grids(x.shape[2], x.shape[3])
        x = self.attention1(x)
        x = self.attention2(x, first)
        return split_linear(x, self.project, None, _LATER, second, self.backend)


def check_images(x: Tensor, in_chans: int, weight: Tensor | None = None) -> None:
    """Raise unless ``x`` is a batch of images (B, in_chans, H, W) on which the first window fits.

    With ``weight``, one of the model's, both must have one dtype, except under autocast.
    """
    check_tensor("images", x, 4)
    if weight is not None:
        check_alike("images", x, ("the model's weights", weight))
    if x.shape[1] != in_chans:
        raise ValueError(
            f"images must have shape (B, {in_chans}, H, W), got {tuple(x.shape)}; pass in_chans={x.shape[1]} when "
            "creating the model for images of that many channels"
        )
    smallest = _FIRST[0] - 2 * _FIRST[2]
    if x.shape[2] < smallest or x.shape[3] < smallest:
        raise ValueError(f"images must be at least {smallest} px high and wide, got {x.shape[2]} x {x.shape[3]}")


def _chunk(x: object, backend: str) -> int | None:
    """How many images to run at a time in eager inference on the CPU; None for all, as for ``reference``."""
    if not isinstance(x, Tensor) or torch.is_grad_enabled():  # a tracer's proxy is no Tensor
        return None
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # the number of chunks must not enter a graph
        return None
    if x.device.type != "cpu" or resolve_backend(backend) == "reference":
        return None
    return max(1, _CHUNK_PIXELS // (x.shape[2] * x.shape[3]))
