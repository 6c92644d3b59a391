"""Ghost attention and MLP (paper §3.3; arXiv 1911.11907): half or a third of the features are cheap copies.

The cheap operation is a depthwise convolution of kernel size 1 without bias: one factor per channel. The parameters
keep the shape and name of that convolution; the arithmetic is a multiplication.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import use_fused_attn
from torch import Tensor, nn
from torch.types import Device

from ..checks import check_real, factory_options
from ..ops.common.autograd import runs_eagerly
from .attention import attend, split_width
from .mlp import apply_linear
from .plain import are_plain, is_plain_weight, is_watched


class ChannelScale(nn.Conv1d):
    """A depthwise Conv1d of kernel size 1 without bias, applied to (B, N, C) tokens as a product."""

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, dim, kernel_size=1, groups=dim, bias=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        if not is_plain_weight(self.weight):
            return super().forward(x.transpose(1, 2)).transpose(1, 2)
        return x * self.weight.flatten()


class GhostAttention(nn.Module):
    """Self-attention whose q, k and v are half computed, half scaled copies. Arguments as for ``Attention``."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
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
        half = dim // 2
        self.q = nn.Linear(dim, half, bias=qkv_bias, **options)
        self.k = nn.Linear(dim, half, bias=qkv_bias, **options)
        self.v = nn.Linear(dim, half, bias=qkv_bias, **options)
        self.cheap_operation_q = ChannelScale(half, **options)
        self.cheap_operation_k = ChannelScale(half, **options)
        self.cheap_operation_v = ChannelScale(half, **options)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **options)
        self.proj_drop = nn.Dropout(proj_drop)

    def _heads(self, x: Tensor, linear: nn.Linear, cheap: nn.Module) -> Tensor:
        x = apply_linear(x, linear, self.backend)
        x = torch.cat((x, cheap(x)), dim=-1)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def forward(self, x: Tensor, num_tokens: int | None = None) -> Tensor:
        """(B, N, C) to (B, N, C); with ``num_tokens``, to the first so many tokens of the result."""
        q = self._heads(x if num_tokens is None else x[:, :num_tokens], self.q, self.cheap_operation_q)
        k = self._heads(x, self.k, self.cheap_operation_k)
        v = self._heads(x, self.v, self.cheap_operation_v)
        y = attend(q, k, v, self.scale, self.attn_drop, self.fused_attn, self.backend)
        return self.proj_drop(apply_linear(y.transpose(1, 2).flatten(2), self.proj, self.backend))


class GhostMlp(nn.Module):
    """An MLP whose hidden layer is ``gelu(fc1(x))`` of width ``dim`` and two cheap copies of it.

    Args:
        dim: Channels in, out, and of ``fc1``; the hidden layer has 3 ``dim``.
        drop: Dropout after the hidden layer and after ``fc2``.
        backend: Passed to the ops.
        device: Where the parameters are made.
        dtype: Their floating-point type; None for torch's default.
    """

    def __init__(
        self,
        dim: int,
        drop: float = 0.0,
        backend: str = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options = factory_options(device, dtype)
        self.backend = backend
        self.fc1 = nn.Linear(dim, dim, **options)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(3 * dim, dim, **options)
        self.drop = nn.Dropout(drop)
        self.cheap_operation2 = ChannelScale(dim, **options)
        self.cheap_operation3 = ChannelScale(dim, **options)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        hidden = self._hidden(apply_linear(x, self.fc1, self.backend))
        return self.drop(apply_linear(self.drop(hidden), self.fc2, self.backend))

    def _hidden(self, x: Tensor) -> Tensor:
        """``gelu(x)`` and its two cheap copies, (B, N, C) to (B, N, 3C)."""
        cheap = self.cheap_operation2, self.cheap_operation3
        if torch.is_grad_enabled() or not runs_eagerly(x) or not _are_plain(x, self.act, *cheap):
            x1 = self.act(x)
            return torch.cat((x1, *(self.act(copy(x1)) for copy in cheap)), dim=-1)
        hidden = x.new_empty(*x.shape[:-1], 3 * x.shape[-1])
        parts = hidden.chunk(3, dim=-1)
        torch.ops.aten.gelu_.default(parts[0].copy_(x))
        for part, copy in zip(parts[1:], cheap, strict=True):
            torch.ops.aten.gelu_.default(torch.mul(parts[0], copy.weight.flatten(), out=part))
        return hidden


def _are_plain(x: Tensor, act: nn.Module, *cheap: ChannelScale) -> bool:
    """Whether library operations may run in place of the activation and the cheap operations of ``x``."""
    made = all(
        type(copy) is ChannelScale and is_plain_weight(copy.weight) and copy.weight.dtype == x.dtype for copy in cheap
    )
    return made and are_plain(act) and not is_watched(*cheap)
