"""Soft splits: overlapping windows of an image or of a token grid as tokens, alone or with LayerNorm and Linear."""

from .op import output_grid, soft_split, soft_split_linear

__all__ = ["output_grid", "soft_split", "soft_split_linear"]
