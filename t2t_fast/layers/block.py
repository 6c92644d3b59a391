"""Backbone blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.types import Device

from ..checks import LARGEST, check_real, factory_options
from ..ops import linear
from ..ops.block.whole import whole_block
from .attention import Attention
from .block_weights import weights_for
from .branch import add_and_norm, adds_residual, drop_path_scale, run_branch
from .ghost import GhostAttention, GhostMlp
from .mlp import Mlp, apply_linear, apply_norm
from .packed_linear import PackedLinear
from .plain import are_plain, class_of
from .se import SEMlp

torch.fx.wrap("linear")

# What the block's parts are where the first tokens of its result need, past the attention, those tokens alone.
_PER_TOKEN: dict[str, tuple[type[nn.Module], ...]] = {
    "attn": (Attention, GhostAttention),
    "drop_path": (nn.Identity, DropPath),
    "norm2": (nn.LayerNorm,),
    "mlp": (Mlp, GhostMlp),
}

BLOCK_TYPES = ("standard", "se", "se_mlp", "ghost", "dense")


class Block(nn.Module):
    """Pre-norm transformer block (paper §3.2): attention and MLP, each with a residual and stochastic depth.

    Args:
        dim: Channels.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLP over ``dim``.
        qkv_bias: Bias on the q, k, v projection.
        qk_scale: Factor on the scores; None means ``head_dim**-0.5``.
        drop: Dropout after projections and inside the MLP.
        attn_drop: Dropout on the attention weights.
        drop_path: Probability of dropping a residual branch, per image.
        norm_layer: Makes the two norms.
        block_type: ``"standard"``, ``"se"`` (gate after the attention projection), ``"se_mlp"`` (gate on the MLP's
            output) or ``"ghost"``; ``"dense"`` is :class:`DenseBlock`, whose inner block is standard.
        backend: Passed to the ops.
        device: Where the parameters are made.
        dtype: Their floating-point type; None for torch's default.

    Raises:
        TypeError: ``mlp_ratio`` is no number.
        ValueError: Unknown ``block_type``; an ``mlp_ratio`` that leaves no hidden channel; for ``"ghost"``, one other
            than 3 or an odd ``dim``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        block_type: str = "standard",
        backend: str = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options = factory_options(device, dtype)
        if block_type not in BLOCK_TYPES:
            raise ValueError(f"block_type={block_type!r} is unknown; accepted: {', '.join(BLOCK_TYPES)}")
        hidden_dim = int(dim * check_real("mlp_ratio", mlp_ratio))
        if hidden_dim > LARGEST:
            raise ValueError(f"mlp_ratio must leave at most {LARGEST} hidden channels, got {mlp_ratio!r}")
        if hidden_dim < 1:
            raise ValueError(f"mlp_ratio must leave at least one hidden channel of {dim}, got {mlp_ratio!r}")
        self.norm1 = norm_layer(dim, **options)
        self.attn: nn.Module
        self.mlp: nn.Module
        if block_type == "ghost":
            if mlp_ratio != 3 or dim % 2:
                raise ValueError(f"a ghost block needs mlp_ratio=3 and an even width, got {mlp_ratio=}, {dim=}")
            self.attn = GhostAttention(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop, backend, **options)
        else:
            se = block_type == "se"
            self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop, se, backend, **options)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim, **options)
        if block_type == "ghost":
            self.mlp = GhostMlp(dim, drop, backend, **options)
        elif block_type == "se_mlp":
            self.mlp = SEMlp(dim, hidden_dim, drop, backend=backend, **options)
        else:
            self.mlp = Mlp(dim, hidden_dim, drop, backend, **options)

    def forward(self, x: Tensor, num_tokens: int | None = None) -> Tensor:
        """``x = x + drop_path(attn(norm1(x)))``, then ``x + drop_path(mlp(norm2(x)))``: (B, N, C) to (B, N, C).

        With ``num_tokens``, the first so many tokens of the result, (B, num_tokens, C), for whose sake the others are
        computed only as far as these need them.
        """
        weights = weights_for(self, x, num_tokens)
        if weights is not None:  # an unmodified block: the same formula, checking once instead of op by op
            drop_path: Any = self._modules["drop_path"]
            if not drop_path.training:
                return whole_block(x, weights, num_tokens=num_tokens)
            return whole_block(x, weights, (drop_path_scale(drop_path, x), drop_path_scale(drop_path, x)), num_tokens)
        if num_tokens is not None and not self._works_per_token():
            return Block.forward(self, x)[:, :num_tokens]
        y = apply_norm(x, self.norm1)
        if adds_residual(self.attn, self.drop_path):  # with a gate, in whose pass the sum is free
            x = _first(run_branch(x, y, self.attn, self.drop_path), num_tokens)
            y = apply_norm(x, self.norm2)
        else:
            backend = getattr(self.attn, "backend", "auto")
            y = self.attn(y) if num_tokens is None else self.attn(y, num_tokens=num_tokens)
            x, y = add_and_norm(_first(x, num_tokens), y, self.norm2, self.drop_path, backend)
        return run_branch(x, y, self.mlp, self.drop_path)

    def _works_per_token(self) -> bool:
        return all(class_of(getattr(self, name)) in kinds for name, kinds in _PER_TOKEN.items())


def _first(x: Tensor, num_tokens: int | None) -> Tensor:
    return x if num_tokens is None else x[:, :num_tokens]


class DenseBlock(Block):
    """A block that appends ``growth_rate`` new channels to its input: ``cat(x, dense_linear(block(x)))``."""

    def __init__(self, dim: int, growth_rate: int, **kwargs: Any) -> None:
        super().__init__(dim, **kwargs)
        self.dense_linear = nn.Linear(dim, growth_rate, **factory_options(kwargs.get("device"), kwargs.get("dtype")))
        self.backend = str(kwargs.get("backend", "auto"))

    def forward(self, x: Tensor, num_tokens: int | None = None) -> Tensor:
        """(B, N, C) to (B, N, C + growth_rate); ``num_tokens`` as for :class:`Block`."""
        if num_tokens is None or class_of(self.dense_linear) not in (nn.Linear, PackedLinear):
            y = super().forward(x)
        else:
            y = super().forward(x, num_tokens)
        y = apply_linear(y, self.dense_linear, self.backend)
        return torch.cat((_first(x, num_tokens), _first(y, num_tokens)), dim=-1)


class Transition(nn.Module):
    """Halves the channels between two dense stages: ``gelu(linear(x))``."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        backend: str = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.linear = nn.Linear(in_features, out_features, **factory_options(device, dtype))
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, in_features) to (B, N, out_features)."""
        if are_plain(self.linear, self.act):
            return linear(x, self.linear.weight, self.linear.bias, gelu=True, backend=self.backend)
        return self.act(self.linear(x))
