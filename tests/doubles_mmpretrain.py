"""A stand-in for mmpretrain's T2T-ViT: its names and structure, as :mod:`doubles` for the official code."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from doubles import to_grid
from timm.layers import DropPath
from torch import Tensor, nn

from t2t_fast.models.pos_embed import sinusoid_table


class FFN(nn.Module):
    def __init__(self, embed_dims: int, feedforward_channels: int, ffn_drop: float, drop_path: float) -> None:
        super().__init__()
        first = nn.Sequential(nn.Linear(embed_dims, feedforward_channels), nn.GELU(), nn.Dropout(ffn_drop))
        self.layers = nn.Sequential(first, nn.Linear(feedforward_channels, embed_dims), nn.Dropout(ffn_drop))
        self.dropout_layer = DropPath(drop_path)
        self.gamma2 = nn.Identity()

    def forward(self, x: Tensor, identity: Tensor) -> Tensor:
        return identity + self.dropout_layer(self.gamma2(self.layers(x)))


def attention_divided(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float) -> Tensor:
    """Attention whose ``scale`` divides the scores."""
    weights = (torch.einsum("bhqd,bhkd->bhqk", q, k) / scale).softmax(dim=-1)
    return torch.einsum("bhqk,bhkd->bhqd", F.dropout(weights, dropout_p), v)


class MultiheadAttention(nn.Module):
    """With ``divides``, as from version 1.0.0rc7 on."""

    def __init__(
        self,
        input_dims: int,
        embed_dims: int,
        num_heads: int,
        qk_scale: float,
        attn_drop: float,
        proj_drop: float,
        drop_path: float,
        v_shortcut: bool,
        divides: bool,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dims, self.v_shortcut = num_heads, embed_dims // num_heads, v_shortcut
        self.attn_drop: Any
        if divides:
            self.scaled_dot_product_attention = partial(attention_divided, scale=self.head_dims**-0.5)
            self.attn_drop = attn_drop
        else:
            self.scale = qk_scale
            self.attn_drop = nn.Dropout(attn_drop)
        self.qkv = nn.Linear(input_dims, 3 * embed_dims, bias=False)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.proj_drop = nn.Dropout(proj_drop)
        self.out_drop = DropPath(drop_path)
        self.gamma1 = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dims))
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        if hasattr(self, "scale"):
            weights = self.attn_drop((torch.einsum("bhqd,bhkd->bhqk", q, k) * self.scale).softmax(dim=-1))
            y = torch.einsum("bhqk,bhkd->bhqd", weights, v)
        else:
            y = self.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop if self.training else 0.0)
        y = self.out_drop(self.gamma1(self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))))
        return v.squeeze(1) + y if self.v_shortcut else y


class T2TTransformerLayer(nn.Module):
    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        feedforward_channels: int,
        input_dims: int | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        divides: bool = False,
    ) -> None:
        super().__init__()
        width = input_dims or embed_dims
        self.v_shortcut = input_dims is not None
        scale = (width // num_heads) ** -0.5
        rates = (attn_drop_rate, drop_rate, drop_path_rate)
        self.ln1 = nn.LayerNorm(width)
        self.attn = MultiheadAttention(width, embed_dims, num_heads, scale, *rates, self.v_shortcut, divides)
        self.ln2 = nn.LayerNorm(embed_dims)
        self.ffn = FFN(embed_dims, feedforward_channels, drop_rate, drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn(self.ln1(x))
        x = y if self.v_shortcut else x + y
        return self.ffn(self.ln2(x), identity=x)


class T2TModule(nn.Module):
    def __init__(self, in_channels: int, embed_dims: int, token_dims: int, divides: bool) -> None:
        super().__init__()
        self.soft_split0 = nn.Unfold(kernel_size=(7, 7), stride=(4, 4), padding=(2, 2))
        self.soft_split1 = nn.Unfold(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))
        self.soft_split2 = nn.Unfold(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))
        self.attention1 = T2TTransformerLayer(token_dims, 1, token_dims, in_channels * 7 * 7, divides=divides)
        self.attention2 = T2TTransformerLayer(token_dims, 1, token_dims, token_dims * 3 * 3, divides=divides)
        self.project = nn.Linear(token_dims * 3 * 3, embed_dims)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        height, width = x.shape[2:]
        splits = (self.soft_split0, self.soft_split1, self.soft_split2)
        for split, layer in zip(splits, (self.attention1, self.attention2, self.project), strict=True):
            x = layer(split(x).transpose(1, 2))
            k, s, p = split.kernel_size[0], split.stride[0], split.padding[0]
            height, width = ((n + 2 * p - k) // s + 1 for n in (height, width))
            if layer is not self.project:
                x = to_grid(x, height, width)
        return x, (height, width)


class MMPretrainT2TViT(nn.Module):
    """mmpretrain's backbone, there called ``T2T_ViT``."""

    def __init__(
        self,
        img_size: int = 64,
        in_channels: int = 3,
        embed_dims: int = 32,
        num_layers: int = 2,
        num_heads: int = 2,
        token_dims: int = 64,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        with_cls_token: bool = True,
        out_type: str = "cls_token",
        divides: bool = False,
    ) -> None:
        super().__init__()
        self.tokens_to_token = T2TModule(in_channels, embed_dims, token_dims, divides)
        self.side = img_size // 16
        self.with_cls_token = with_cls_token
        self.out_type = out_type
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dims))
        self.register_buffer("pos_embed", sinusoid_table(self.side**2 + 1, embed_dims))
        self.drop_after_pos = nn.Dropout(drop_rate)
        self.encoder = nn.ModuleList(
            T2TTransformerLayer(
                embed_dims,
                num_heads,
                3 * embed_dims,
                drop_rate=drop_rate,
                attn_drop_rate=attn_drop_rate,
                drop_path_rate=drop_path_rate * i / max(num_layers - 1, 1),
                divides=divides,
            )
            for i in range(num_layers)
        )
        self.norm = nn.LayerNorm(embed_dims)

    def _table(self, height: int, width: int) -> Tensor:
        if (height, width) == (self.side, self.side):
            return self.pos_embed
        first, table = self.pos_embed[:, :1], to_grid(self.pos_embed[:, 1:], self.side, self.side)
        table = F.interpolate(table, size=(height, width), mode="bicubic", align_corners=False)
        return torch.cat((first, table.flatten(2).transpose(1, 2)), dim=1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x, (height, width) = self.tokens_to_token(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.drop_after_pos(x + self._table(height, width))
        for layer in self.encoder:
            x = layer(x)
        x = self.norm(x)
        return (x[:, 1:].mean(dim=1) if self.out_type == "avg_featmap" else x[:, 0],)


class VisionTransformerClsHead(nn.Module):
    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        self.layers.add_module("head", nn.Linear(in_channels, num_classes))

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        return self.layers(features[-1])


class DataPreprocessor(nn.Module):
    """Holds the images' mean and deviation, as buffers that no state dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((3, 1, 1), 127.5), persistent=False)
        self.register_buffer("std", torch.full((3, 1, 1), 127.5), persistent=False)


class ImageClassifier(nn.Module):
    """A backbone and a head; ``backbone`` are the keyword arguments of :class:`MMPretrainT2TViT`."""

    def __init__(self, num_classes: int = 10, **backbone: Any) -> None:
        super().__init__()
        self.data_preprocessor = DataPreprocessor()
        self.backbone = MMPretrainT2TViT(**backbone)
        self.head = VisionTransformerClsHead(num_classes, self.backbone.cls_token.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))
