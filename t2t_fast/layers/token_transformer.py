"""Soft split and a softmax-attention token layer."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import use_fused_attn
from torch import Tensor, nn
from torch.types import Device

from ..checks import factory_options
from ..ops import soft_split
from .attention import attend
from .branch import run_branch
from .mlp import Mlp, apply_linear, apply_norm
from .plain import is_watched
from .split import split_linear

torch.fx.wrap("soft_split")


class TokenTransformer(nn.Module):
    """A soft split followed by the transformer token layer of T2T-ViT_t (paper §3.1).

    ``y = attn(norm1(soft_split(x)))``, which has a skip of its own; ``y + mlp(norm2(y))``.

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
        self.norm1 = nn.LayerNorm(dim, **options)
        self.attn: nn.Module = TokenAttention(dim, token_dim, backend, **options)
        self.norm2 = nn.LayerNorm(token_dim, **options)
        self.mlp = Mlp(token_dim, token_dim, backend=backend, **options)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Image (B, C, H, W), or tokens (B, H*W, C) with ``grid=(H, W)``, to tokens (B, L, token_dim)."""
        if type(self.attn) is TokenAttention and not is_watched(self.attn):
            split = {"norm": self.norm1, "window": self.window, "grid": grid, "folded": self.folded}
            y = self.attn(x, split)
        else:
            y = self.attn(self.norm1(soft_split(x, *self.window, grid=grid, backend=self.backend)))
        return run_branch(y, apply_norm(y, self.norm2), self.mlp)


class TokenAttention(nn.Module):
    """Attention of a token transformer: ``q, k, v = qkv(x)``; ``v + proj_drop(proj(attention(q, k, v)))``; one head.

    Args:
        dim: Channels of the incoming tokens; the scale is ``dim**-0.5``.
        token_dim: Channels of q, k, v and of the result.
        backend: Passed to the ops.
        device: Where the parameters are made.
        dtype: Their floating-point type; None for torch's default.
    """

    def __init__(
        self,
        dim: int,
        token_dim: int,
        backend: str = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options = factory_options(device, dtype)
        self.scale, self.backend = dim**-0.5, backend
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(dim, 3 * token_dim, bias=False, **options)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(token_dim, token_dim, **options)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, split: dict[str, Any] | None = None) -> Tensor:
        """Tokens (B, L, dim) to (B, L, token_dim).

        With ``split``, arguments of :func:`split_linear`, ``x`` is what comes before the soft split and its norm.
        """
        if split is None:
            tokens = apply_linear(x, self.qkv, self.backend)
        else:
            tokens = split_linear(x, self.qkv, backend=self.backend, **split)
        q, k, v = tokens.unsqueeze(1).chunk(3, dim=-1)
        y = attend(q, k, v, self.scale, self.attn_drop, self.fused_attn, self.backend).squeeze(1)
        return v.squeeze(1) + self.proj_drop(apply_linear(y, self.proj, self.backend))
