"""Stand-ins for the T2T-ViTs of the official code and of mmpretrain: their classes and attributes, literal arithmetic.

Neither project needs to be installed to test what takes their models over. Written from the description of the model,
step by step as it defines them (unfold, softmax over the full matrix, einsum), with no regard to speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from t2t_fast.models.pos_embed import sinusoid_table


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter random values of a size that lets each of them, and the image, move the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.data = (0.1 * noise + (0.0 if name.endswith("bias") else 1.0)).to(parameter)
        else:
            gain = 0.5 if "kqv" in name else 1.0  # where keys and queries are long, the Performer's features vanish
            parameter.data = (noise * gain * parameter[0].numel() ** -0.5).to(parameter)
    return model


def to_grid(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens (B, H*W, C) as an image (B, C, H, W)."""
    batch, count, channels = tokens.shape
    assert count == height * width
    return tokens.transpose(1, 2).reshape(batch, channels, height, width)


# The official code


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.act(self.fc1(x)))
        return self.drop(self.fc2(hidden))


class SELayer(nn.Module):
    def __init__(self, dim: int, reduction: int = 16) -> None:
        super().__init__()
        narrow = dim // reduction
        self.avg_pool = nn.AdaptiveAvgPool1d(1)
        self.fc = nn.Sequential(
            nn.Linear(dim, narrow, bias=False), nn.ReLU(inplace=True), nn.Linear(narrow, dim, bias=False), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        mean = self.avg_pool(x.transpose(1, 2)).flatten(1)
        return x * self.fc(mean).unsqueeze(1)


class Attention(nn.Module):
    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool,
        qk_scale: float | None,
        attn_drop: float,
        proj_drop: float,
        se: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        if se:
            self.se_layer = SELayer(dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in (q, k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.scale
        weights = self.attn_drop(scores.softmax(dim=-1))
        y = self.proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))
        return self.proj_drop(self.se_layer(y) if hasattr(self, "se_layer") else y)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*self.qkv(x).chunk(3, dim=-1))


def cheap_operation(dim: int) -> nn.Conv1d:
    return nn.Conv1d(dim, dim, kernel_size=1, groups=dim, bias=False)


class GhostAttention(Attention):
    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, *rest: Any) -> None:
        super().__init__(dim, num_heads, qkv_bias, *rest)
        del self.qkv
        for part in "qkv":
            setattr(self, part, nn.Linear(dim, dim // 2, bias=qkv_bias))
            setattr(self, f"cheap_operation_{part}", cheap_operation(dim // 2))

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for part in "qkv":
            half = self.get_submodule(part)(x)
            copy = self.get_submodule(f"cheap_operation_{part}")(half.transpose(1, 2)).transpose(1, 2)
            parts.append(torch.cat((half, copy), dim=-1))
        return self.attend(*parts)


class GhostMlp(Mlp):
    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__(dim, hidden, drop)
        self.fc1 = nn.Linear(dim, dim)
        self.cheap_operation2 = cheap_operation(dim)
        self.cheap_operation3 = cheap_operation(dim)

    def forward(self, x: Tensor) -> Tensor:
        first = self.act(self.fc1(x))
        copies = [self.act(cheap(first.transpose(1, 2))) for cheap in (self.cheap_operation2, self.cheap_operation3)]
        hidden = torch.cat((first, *(copy.transpose(1, 2) for copy in copies)), dim=-1)
        return self.drop(self.fc2(self.drop(hidden)))


class Block(nn.Module):
    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        qk_scale: float | None,
        drop: float,
        attn_drop: float,
        drop_path: float,
        block_type: str,
    ) -> None:
        super().__init__()
        attention_class: Callable[..., nn.Module] = GhostAttention if block_type == "ghost" else Attention
        if block_type == "se":
            attention_class = partial(Attention, se=True)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention_class(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = (GhostMlp if block_type == "ghost" else Mlp)(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class DenseBlock(Block):
    def __init__(self, dim: int, growth_rate: int, *args: Any) -> None:
        super().__init__(dim, *args)
        self.dense_linear = nn.Linear(dim, growth_rate)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.dense_linear(super().forward(x))), dim=2)


class Transition(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim // 2)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(x))


class Token_performer(nn.Module):
    def __init__(self, dim: int, in_dim: int, kernel_ratio: float = 0.5, dp: float = 0.1) -> None:
        super().__init__()
        self.emb = in_dim
        self.m = int(in_dim * kernel_ratio)
        self.epsilon = 1e-8
        self.kqv = nn.Linear(dim, 3 * in_dim)
        self.dp = nn.Dropout(dp)
        self.proj = nn.Linear(in_dim, in_dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(in_dim)
        self.mlp = nn.Sequential(nn.Linear(in_dim, in_dim), nn.GELU(), nn.Linear(in_dim, in_dim), nn.Dropout(dp))
        rows = nn.init.orthogonal_(torch.empty(self.m, in_dim))
        self.w = nn.Parameter(rows * math.sqrt(self.m), requires_grad=False)

    def phi(self, z: Tensor) -> Tensor:
        half_square = (z * z).sum(dim=-1, keepdim=True) / 2
        return torch.exp(torch.einsum("bte,me->btm", z, self.w) - half_square) / math.sqrt(self.m)

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = self.kqv(self.norm1(x)).split(self.emb, dim=-1)
        k, q = self.phi(k), self.phi(q)
        numerator = torch.einsum("btm,bme->bte", q, torch.einsum("bsm,bse->bme", k, v))
        denominator = torch.einsum("btm,bm->bt", q, k.sum(dim=1)).unsqueeze(-1)
        y = v + self.dp(self.proj(numerator / (denominator + self.epsilon)))
        return y + self.mlp(self.norm2(y))


class TokenAttention(nn.Module):
    def __init__(self, dim: int, in_dim: int) -> None:
        super().__init__()
        self.num_heads = 1
        self.scale = dim**-0.5
        self.qkv = nn.Linear(dim, 3 * in_dim, bias=False)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(in_dim, in_dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        weights = self.attn_drop((torch.einsum("bqe,bke->bqk", q, k) * self.scale).softmax(dim=-1))
        return v + self.proj_drop(self.proj(weights @ v))


class Token_transformer(nn.Module):
    def __init__(self, dim: int, in_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = TokenAttention(dim, in_dim)
        self.drop_path = nn.Identity()
        self.norm2 = nn.LayerNorm(in_dim)
        self.mlp = Mlp(in_dim, in_dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn(self.norm1(x))
        return y + self.drop_path(self.mlp(self.norm2(y)))


class T2T_module(nn.Module):
    def __init__(self, img_size: int, tokens_type: str, in_chans: int, embed_dim: int, token_dim: int) -> None:
        super().__init__()
        self.num_patches = (img_size // 16) ** 2
        if tokens_type == "convolution":
            self.soft_split0 = nn.Conv2d(in_chans, token_dim, 7, 4, 2)
            self.soft_split1 = nn.Conv2d(token_dim, token_dim, 3, 2, 1)
            self.project = nn.Conv2d(token_dim, embed_dim, 3, 2, 1)
            return
        layer = Token_performer if tokens_type == "performer" else Token_transformer
        self.soft_split0 = nn.Unfold(kernel_size=(7, 7), stride=(4, 4), padding=(2, 2))
        self.soft_split1 = nn.Unfold(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))
        self.soft_split2 = nn.Unfold(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))
        self.attention1 = layer(in_chans * 7 * 7, token_dim)
        self.attention2 = layer(token_dim * 3 * 3, token_dim)
        self.project = nn.Linear(token_dim * 3 * 3, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.project, nn.Conv2d):
            return self.project(self.soft_split1(self.soft_split0(x))).flatten(2).transpose(1, 2)
        x = self.attention1(self.soft_split0(x).transpose(1, 2))
        x = self.soft_split1(to_grid(x, *[math.isqrt(x.shape[1])] * 2)).transpose(1, 2)
        x = self.attention2(x)
        x = self.soft_split2(to_grid(x, *[math.isqrt(x.shape[1])] * 2)).transpose(1, 2)
        return self.project(x)


class T2T_ViT(nn.Module):
    """The official model; ``block_type`` and the last two arguments choose among its comparison designs."""

    def __init__(
        self,
        img_size: int = 64,
        tokens_type: str = "performer",
        in_chans: int = 3,
        num_classes: int = 10,
        embed_dim: int = 32,
        depth: int = 2,
        num_heads: int = 2,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        token_dim: int = 64,
        block_type: str = "standard",
        growth_rate: int = 8,
        block_config: tuple[int, ...] = (1, 1),
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.tokens_to_token = T2T_module(img_size, tokens_type, in_chans, embed_dim, token_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        table = sinusoid_table(self.tokens_to_token.num_patches + 1, embed_dim)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.pos_drop = nn.Dropout(drop_rate)
        shared = (num_heads, mlp_ratio, qkv_bias, qk_scale, drop_rate, attn_drop_rate)
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList()
        width = embed_dim
        if block_type == "dense":
            remaining = iter(rates)
            for stage, blocks in enumerate(block_config):
                if stage:
                    self.blocks.append(Transition(width))
                    width //= 2
                for _ in range(blocks):
                    self.blocks.append(DenseBlock(width, growth_rate, *shared, next(remaining), "standard"))
                    width += growth_rate
        else:
            self.blocks.extend(Block(width, *shared, rate, block_type) for rate in rates)
        self.num_features = self.embed_dim = width
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes) if num_classes > 0 else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.tokens_to_token(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.pos_drop(x + self.pos_embed)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))
