"""The table of models: constructor arguments, the paper's figures and the released weights of each name.

Source: Tables 1, 2, 3, 6 and 8 of the paper (arXiv 2101.11986) and the official release page.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_RELEASE = "https://github.com/yitu-opensource/T2T-ViT/releases/download/main/"


@dataclass(frozen=True)
class Published:
    """The paper's figures at 224 px: top-1 in percent, parameters in millions, MACs in billions."""

    top1: float
    params_m: float
    macs_g: float


@dataclass(frozen=True)
class Variant:
    """Constructor arguments of one named model, its published figures, and its weights by tag.

    Attributes:
        kwargs: Keyword arguments of :class:`t2t_fast.models.T2TViT` (or of the class that ``block_type`` names).
        published: The paper's figures, or None for a design of this project.
        weights: Tag to (file name on the official release page, image size in pixels).
    """

    kwargs: dict[str, Any]
    published: Published | None = None
    weights: dict[str, tuple[str, int]] = field(default_factory=dict)

    def url(self, tag: str) -> str:
        """The download address of the weights called ``tag``."""
        return _RELEASE + self.weights[tag][0]


def _variant(
    embed_dim: int,
    depth: int,
    num_heads: int,
    mlp_ratio: float = 3.0,
    *,
    tokens_type: str = "performer",
    block_type: str = "standard",
    published: Published | None = None,
    weights: dict[str, tuple[str, int]] | None = None,
    **kwargs: Any,
) -> Variant:
    kwargs.update(
        tokens_type=tokens_type,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        block_type=block_type,
    )
    return Variant(kwargs=kwargs, published=published, weights=weights or {})


VARIANTS: dict[str, Variant] = {
    "t2t_vit_7": _variant(
        256, 7, 4, 2.0, published=Published(71.7, 4.3, 1.1), weights={"in1k": ("71.7_T2T_ViT_7.pth.tar", 224)}
    ),
    "t2t_vit_10": _variant(
        256, 10, 4, 2.0, published=Published(75.2, 5.9, 1.5), weights={"in1k": ("75.2_T2T_ViT_10.pth.tar", 224)}
    ),
    "t2t_vit_12": _variant(
        256, 12, 4, 2.0, published=Published(76.5, 6.9, 1.8), weights={"in1k": ("76.5_T2T_ViT_12.pth.tar", 224)}
    ),
    "t2t_vit_14": _variant(
        384,
        14,
        6,
        published=Published(81.5, 21.5, 4.8),
        weights={"in1k": ("81.5_T2T_ViT_14.pth.tar", 224), "in1k_384": ("83.3_T2T_ViT_14.pth.tar", 384)},
    ),
    "t2t_vit_19": _variant(
        448, 19, 7, published=Published(81.9, 39.2, 8.5), weights={"in1k": ("81.9_T2T_ViT_19.pth.tar", 224)}
    ),
    "t2t_vit_24": _variant(
        512, 24, 8, published=Published(82.3, 64.1, 13.8), weights={"in1k": ("82.3_T2T_ViT_24.pth.tar", 224)}
    ),
    "t2t_vit_t_14": _variant(
        384,
        14,
        6,
        tokens_type="transformer",
        published=Published(81.7, 21.5, 6.1),
        weights={"in1k": ("81.7_T2T_ViTt_14.pth.tar", 224)},
    ),
    "t2t_vit_t_19": _variant(
        448,
        19,
        7,
        tokens_type="transformer",
        published=Published(82.2, 39.2, 9.8),
        weights={"in1k": ("82.4_T2T_ViTt_19.pth.tar", 224)},
    ),
    "t2t_vit_t_24": _variant(
        512,
        24,
        8,
        tokens_type="transformer",
        published=Published(82.6, 64.1, 15.0),
        weights={"in1k": ("82.6_T2T_ViTt_24.pth.tar", 224)},
    ),
    "t2t_vit_c_14": _variant(384, 14, 6, tokens_type="convolution", published=Published(80.8, 21.3, 4.6)),
    "t2t_vit_14_resnext": _variant(384, 14, 32, published=Published(81.5, 21.5, 4.8)),
    "t2t_vit_14_wide": _variant(768, 4, 12, published=Published(77.9, 25.1, 5.0)),
    "t2t_vit_14_se": _variant(384, 14, 6, block_type="se", published=Published(81.6, 21.9, 4.9)),
    "t2t_vit_14_se_mlp": _variant(384, 14, 6, block_type="se_mlp"),
    "t2t_vit_16_ghost": _variant(384, 16, 6, block_type="ghost", published=Published(79.5, 16.3, 3.7)),
    "t2t_vit_dense": _variant(
        128,
        19,
        8,
        2.0,
        block_type="dense",
        growth_rate=64,
        block_config=(3, 6, 6, 4),
        published=Published(80.6, 23.7, 5.5),
    ),
}
