"""T2T-ViT-Dense (paper §3.3): every block appends channels, transitions halve them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..checks import check_count
from ..layers import DenseBlock, Transition
from .t2t_vit import T2TViT


class T2TViTDense(T2TViT):
    """Densely connected T2T-ViT.

    Args:
        growth_rate: Number of channels that each block appends.
        block_config: Number of blocks per stage; a transition joins two stages.
        **kwargs: As for :class:`T2TViT`; ``embed_dim`` is the width of the first block and ``depth`` the number of
            blocks, ``sum(block_config)``.

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: ``depth`` and ``block_config`` disagree, or an argument has an impossible value.
    """

    _make_block = DenseBlock

    def __init__(self, growth_rate: int = 32, block_config: Sequence[int] = (3, 4, 6, 3), **kwargs: Any) -> None:
        if not isinstance(block_config, list | tuple) or not block_config:
            raise TypeError(f"block_config must be a sequence of ints, got {block_config!r}")
        self.block_config = tuple(check_count("block_config", blocks, 1) for blocks in block_config)
        self.growth_rate = check_count("growth_rate", growth_rate, 1)
        depth = kwargs.setdefault("depth", sum(self.block_config))
        if depth != sum(self.block_config):
            raise ValueError(f"depth={depth} must be the sum of block_config={self.block_config}")
        super().__init__(**kwargs)

    def _make_blocks(
        self, make_block: Callable[..., nn.Module], drop_path_rates: list[float], **options: Any
    ) -> tuple[nn.ModuleList, int]:
        blocks = nn.ModuleList()
        width, rates = self.embed_dim, iter(drop_path_rates)
        for stage, num_blocks in enumerate(self.block_config):
            if stage > 0:
                blocks.append(Transition(width, width // 2, self.backend, **options))
                width //= 2
            for _ in range(num_blocks):
                blocks.append(make_block(width, self.growth_rate, drop_path=next(rates)))
                width += self.growth_rate
        return blocks, width

    def _block_widths(self) -> list[int]:
        widths = []
        for block in self.blocks:
            if isinstance(block, DenseBlock):
                widths.append(block.dense_linear.in_features + self.growth_rate)
            elif isinstance(block, Transition):
                widths.append(block.linear.out_features)
        return widths
