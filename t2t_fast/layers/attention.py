"""Multi-head self-attention of the backbone's blocks."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import use_fused_attn
from torch import Tensor, nn
from torch.types import Device

from ..checks import as_integer, check_real, factory_options
from ..dispatch import Decision, is_explaining, tell
from ..ops import attention, linear
from ..ops.softmax_attention.reference import scores, weigh
from .mlp import apply_linear
from .packed_linear import PackedLinear
from .plain import class_of, dropout_rate, is_plain_weight, is_watched
from .se import SELayer

torch.fx.wrap("attention")
torch.fx.wrap("linear")
torch.fx.wrap("scores")
torch.fx.wrap("weigh")


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
        self.fused_attn = use_fused_attn()
        self.qkv: nn.Module = nn.Linear(dim, 3 * dim, bias=qkv_bias, **options)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **options)
        self.se_layer = SELayer(dim, backend=backend, **options) if se else nn.Identity()
        self.proj_drop = nn.Dropout(proj_drop)

    @property
    def adds_residual(self) -> bool:
        """Whether the gate comes last, whose pass can add the residual; see ``run_branch``."""
        gated = type(self) is Attention and type(self.se_layer) is SELayer and not is_watched(self.se_layer)
        return gated and dropout_rate(self.proj_drop) == 0

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        branch_scale: Tensor | None = None,
        num_tokens: int | None = None,
    ) -> Tensor:
        """``proj(attention(qkv(x)))`` and the gate if there is one: (B, N, C) to (B, N, C).

        ``residual`` and ``branch_scale``, where the module ``adds_residual``, are as for :func:`t2t_fast.ops.se_gate`.
        With ``num_tokens``, the first so many tokens of the result, (B, num_tokens, C), and no residual.
        """
        if num_tokens is not None and class_of(self.se_layer) is not nn.Identity:  # a gate needs all
            return self.forward(x)[:, :num_tokens]
        q, k, v = self._project(x, num_tokens)
        q, k, v = self._split_heads(q), self._split_heads(k), self._split_heads(v)
        y = attend(q, k, v, self.scale, self.attn_drop, self.fused_attn, self.backend)
        y = apply_linear(y.transpose(1, 2).flatten(2), self.proj, self.backend)
        if residual is not None:
            return self.se_layer(y, residual, branch_scale)
        return self.proj_drop(self.se_layer(y))

    def _project(self, x: Tensor, num_tokens: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the first ``num_tokens`` tokens or of all, keys and values of all: (B, tokens, C) each."""
        qkv: Any = self.qkv
        kind = None if num_tokens is None or is_watched(qkv) else class_of(qkv)
        if kind in (nn.Linear, PackedLinear) and is_plain_weight(qkv.weight):
            width, first = qkv.weight.shape[0] // 3, x[:, :num_tokens]
            if kind is PackedLinear:
                q, kv = qkv(first, (0, width)), qkv(x, (width, 3 * width))
            else:
                q_weight, kv_weight = qkv.weight.split((width, 2 * width))
                q_bias, kv_bias = (None, None) if qkv.bias is None else qkv.bias.split((width, 2 * width))
                q = linear(first, q_weight, q_bias, backend=self.backend)
                kv = linear(x, kv_weight, kv_bias, backend=self.backend)
            return q, *kv.chunk(2, dim=-1)
        # Chunks before heads: their gradients are put together where the projection's backward reads them.
        q, k, v = apply_linear(x, qkv, self.backend).chunk(3, dim=-1)
        return q if num_tokens is None else q[:, :num_tokens], k, v

    def _split_heads(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, heads, N, C / heads)."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, drop: Any, fused: bool, backend: str) -> Tensor:
    """``drop(softmax(scale q kᵀ)) v``, (B, heads, M, D), through :func:`t2t_fast.ops.attention` where possible.

    ``drop`` is called with the attention weights (B, heads, M, N), float32 or better, if it is hooked or replaced, and
    if timm's fused attention is off, now (``set_fused_attn(False)``) or when the layer was made (``fused`` is false).
    """
    rate = dropout_rate(drop)
    if rate is not None and fused and use_fused_attn():
        return attention(q, k, v, scale, rate, backend=backend)
    if is_explaining():
        tell(Decision("attention", "reference", {}, detail="attn_drop is called, or timm's fused attention is off"))
    attn = scores(q, k, scale).softmax(dim=-1)
    return weigh(drop(attn), v)


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
