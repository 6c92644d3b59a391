"""Multi-head self-attention of the backbone's blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.types import Device

from ..checks import as_integer, check_real, factory_options
from ..ops import attention
from .mlp import apply_linear, are_plain
from .packed_linear import PackedLinear
from .se import SELayer

torch.fx.wrap("attention")


class Attention(nn.Module):
    """Multi-head self-attention (paper §3.2); with ``se``, a gate follows the projection (paper §3.3).

    Args:
        dim: Channels in and out.
        num_heads: Heads; must divide ``dim``.
        qkv_bias: Bias on the q, k, v projection.
        qk_scale: Factor on the scores; None means ``head_dim**-0.5``.
        attn_drop: Dropout on the attention weights.
        proj_drop: Dropout after the projection.
        se: Put a squeeze-and-excitation gate after the projection.
        backend: Passed to the ops.
        device: Where the parameters are made.
        dtype: Their floating-point type; None for torch's default.

    Raises:
        TypeError: ``num_heads`` is no integer, or ``qk_scale`` no number.
        ValueError: ``num_heads`` does not divide ``dim``, or ``qk_scale`` is not finite.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        se: bool = False,
        backend: str = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options = factory_options(device, dtype)
        self.num_heads, self.head_dim = split_width(dim, num_heads)
        self.scale = self.head_dim**-0.5 if qk_scale is None else check_real("qk_scale", qk_scale)
        self.backend = backend
        self.qkv: nn.Module = nn.Linear(dim, 3 * dim, bias=qkv_bias, **options)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **options)
        self.se_layer = SELayer(dim, backend=backend, **options) if se else nn.Identity()
        self.proj_drop = nn.Dropout(proj_drop)

    @property
    def adds_residual(self) -> bool:
        """Whether the gate comes last, so that its pass can add the residual; see ``add_branch``."""
        return isinstance(self.se_layer, SELayer) and not (self.training and self.proj_drop.p > 0)

    @property
    def takes_norm(self) -> bool:
        """Whether the first product can apply the norm in front of it; see ``add_branch``."""
        return isinstance(self.qkv, PackedLinear) or are_plain(self.qkv)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        branch_scale: Tensor | None = None,
        norm: nn.LayerNorm | None = None,
    ) -> Tensor:
        """(B, N, C) to (B, N, C).

        ``residual`` and ``branch_scale``, where it ``adds_residual``, are as for :func:`t2t_fast.ops.se_gate`; a plain
        ``norm``, where it ``takes_norm``, is applied to ``x`` first.
        """
        # Chunks before heads: their gradients are put together where the projection's backward reads them.
        q, k, v = apply_linear(x, self.qkv, self.backend, norm).chunk(3, dim=-1)
        q, k, v = self._split_heads(q), self._split_heads(k), self._split_heads(v)
        dropout_p = self.attn_drop.p if self.training else 0.0
        y = attention(q, k, v, self.scale, dropout_p, backend=self.backend)
        y = apply_linear(y.transpose(1, 2).flatten(2), self.proj, self.backend)
        if residual is not None:
            return self.se_layer(y, residual, branch_scale)
        return self.proj_drop(self.se_layer(y))

    def _split_heads(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, heads, N, C / heads)."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


def split_width(dim: int, num_heads: int) -> tuple[int, int]:
    """``num_heads`` as a plain int, and the channels per head.

    Raises:
        TypeError: ``num_heads`` is no integer.
        ValueError: ``num_heads`` does not divide ``dim``.
    """
    heads = as_integer(num_heads)
    if heads is None:
        raise TypeError(f"num_heads must be an int, got {num_heads!r}")
    if heads < 1 or dim % heads:
        raise ValueError(f"num_heads={heads} must divide the embedding width {dim}")
    return heads, dim // heads
