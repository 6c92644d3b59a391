"""Soft split and a softmax-attention token layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.types import Device

from ..checks import factory_options
from ..ops import attention
from .branch import add_branch
from .mlp import Mlp, apply_linear
from .split import split_linear

torch.fx.wrap("attention")


class TokenTransformer(nn.Module):
    """A soft split followed by the transformer token layer of T2T-ViT_t (paper §3.1).

    ``q, k, v = qkv(norm1(soft_split(x)))``; ``y = v + proj(attention(q, k, v))``; ``y + mlp(norm2(y))``; one head,
    and the scale is that of the *incoming* width: ``(in_chans * kernel_size**2)**-0.5``.

    Args:
        in_chans: Channels of the incoming image or token grid.
        token_dim: Width of the tokens made.
        kernel_size: Patch side in pixels.
        stride: Step between patches.
        padding: Zeros on each side.
        backend: Passed to the ops.
        device: Where the parameters are made.
        dtype: Their floating-point type; None for torch's default.
    """

    attn: Any  # a ModuleDict, whose entries a type checker knows only as Module
    folded = False  # whether norm1 is in qkv, as freeze leaves it

    def __init__(
        self,
        in_chans: int,
        token_dim: int,
        kernel_size: int,
        stride: int,
        padding: int,
        backend: str = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options = factory_options(device, dtype)
        self.window = (kernel_size, stride, padding)
        self.backend = backend
        dim = in_chans * kernel_size**2
        self.scale = dim**-0.5
        self.norm1 = nn.LayerNorm(dim, **options)
        self.attn = nn.ModuleDict(
            {
                "qkv": nn.Linear(dim, 3 * token_dim, bias=False, **options),
                "proj": nn.Linear(token_dim, token_dim, **options),
            }
        )
        self.norm2 = nn.LayerNorm(token_dim, **options)
        self.mlp = Mlp(token_dim, token_dim, backend=backend, **options)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Image (B, C, H, W), or tokens (B, H*W, C) with ``grid=(H, W)``, to tokens (B, L, token_dim)."""
        tokens = split_linear(x, self.attn["qkv"], self.norm1, self.window, grid, self.backend, self.folded)
        q, k, v = tokens.unsqueeze(1).chunk(3, dim=-1)
        y = attention(q, k, v, self.scale, backend=self.backend).squeeze(1)
        y = v.squeeze(1) + apply_linear(y, self.attn["proj"], self.backend)
        return add_branch(y, self.mlp, self.norm2)
