"""Soft split and a Performer token layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.types import Device

from ..checks import factory_options
from ..numerics import compute_dtype
from ..ops import performer_attention, soft_split, soft_split_performer
from .plain import are_plain, dropout_rate, has_no_weights, is_plain_weight, is_watched

torch.fx.wrap("performer_attention")
torch.fx.wrap("soft_split")
torch.fx.wrap("soft_split_performer")


class TokenPerformer(nn.Module):
    """A soft split followed by the Performer token layer (paper §3.1).

    ``k, q, v = kqv(norm1(soft_split(x)))``; ``y = v + dropout(proj(performer(k, q, v)))``;
    ``y + dropout(mlp(norm2(y)))`` with an MLP of ratio 1.

    Args:
        in_chans: Channels of the incoming image or token grid.
        token_dim: Width E of the tokens made.
        kernel_size: Patch side in pixels.
        stride: Step between patches.
        padding: Zeros on each side.
        kernel_ratio: Random features per token channel: m = int(E * kernel_ratio).
        drop_rate: Both dropouts; the original fixes them at 0.1.
        backend: Passed to the ops.
        device: Where the parameters are made.
        dtype: Their floating-point type; None for torch's default.

    Raises:
        ValueError: There would be no random feature.
    """

    mlp: Any  # a Sequential, whose entries a type checker knows only as Module
    folded = False  # whether norm1 is in kqv, as freeze leaves it

    def __init__(
        self,
        in_chans: int,
        token_dim: int,
        kernel_size: int,
        stride: int,
        padding: int,
        kernel_ratio: float = 0.5,
        drop_rate: float = 0.1,
        backend: str = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options = factory_options(device, dtype)
        num_features = int(token_dim * kernel_ratio)
        if num_features < 1:
            raise ValueError(
                f"a Performer token layer needs token_dim * {kernel_ratio} >= 1, got token_dim={token_dim}"
            )
        self.window = (kernel_size, stride, padding)
        self.backend = backend
        self.epsilon = 1e-8
        dim = in_chans * kernel_size**2
        self.kqv = nn.Linear(dim, 3 * token_dim, **options)
        self.dp = nn.Dropout(drop_rate)
        self.proj = nn.Linear(token_dim, token_dim, **options)
        self.norm1 = nn.LayerNorm(dim, **options)
        self.norm2 = nn.LayerNorm(token_dim, **options)
        self.mlp = nn.Sequential(
            nn.Linear(token_dim, token_dim, **options),
            nn.GELU(),
            nn.Linear(token_dim, token_dim, **options),
            nn.Dropout(drop_rate),
        )
        self.w = nn.Parameter(torch.empty(num_features, token_dim, **options), requires_grad=False)
        self.reset_random_features()

    @torch.no_grad()
    def reset_random_features(self) -> None:
        """Draw ``w`` anew: orthogonal rows of norm sqrt(m)."""
        rows = nn.init.orthogonal_(torch.empty_like(self.w, dtype=compute_dtype(self.w)))  # no 16-bit form exists
        self.w.copy_(rows.mul_(math.sqrt(rows.shape[0])))

    reset_parameters = reset_random_features  # the name that torch's and timm's tools call

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Image (B, C, H, W), or tokens (B, H*W, C) with ``grid=(H, W)``, to tokens (B, L, token_dim)."""
        rates = self._dropout_rates()
        if rates is None:
            return self._call_parts(x, grid)
        return soft_split_performer(
            x,
            self.kqv.weight,
            self.kqv.bias,
            self.norm1.weight,
            self.norm1.bias,
            self.w,
            self.proj.weight,
            self.proj.bias,
            self.norm2.weight,
            self.norm2.bias,
            self.mlp[0].weight,
            self.mlp[0].bias,
            self.mlp[2].weight,
            self.mlp[2].bias,
            *self.window,
            grid=grid,
            proj_drop=rates[0],
            mlp_drop=rates[1],
            eps=self.epsilon,
            norm1_eps=self.norm1.eps,
            norm2_eps=self.norm2.eps,
            folded=self.folded,
            backend=self.backend,
        )

    def _dropout_rates(self) -> tuple[float, float] | None:
        """The rates of both dropouts; None if a part was replaced or hooked, and so must be called."""
        if type(self.mlp) is not nn.Sequential or len(self.mlp) != 4 or is_watched(self.mlp):
            return None
        *mlp, drop = self.mlp._modules.values()
        unseen = has_no_weights(self.norm1) and not self.folded
        if unseen or not are_plain(self.norm1, self.kqv, self.proj, self.norm2, *mlp) or not is_plain_weight(self.w):
            return None
        rates = dropout_rate(self.dp), dropout_rate(drop)
        return None if rates[0] is None or rates[1] is None else (rates[0], rates[1])

    def _call_parts(self, x: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """The same module by module, for parts that were replaced or hooked."""
        tokens = soft_split(x, *self.window, grid=grid, backend=self.backend)
        k, q, v = self.kqv(self.norm1(tokens)).chunk(3, dim=-1)
        y = performer_attention(k, q, v, self.w, eps=self.epsilon, backend=self.backend)
        y = v + self.dp(self.proj(y))
        return y + self.mlp(self.norm2(y))
