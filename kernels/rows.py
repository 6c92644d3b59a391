"""Rows of tokens (B, T, E) as the Performer's kernels walk them: by strides, in ranges of one image's tokens.

Offsets into tensors are 64-bit, positions within an image 32-bit.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import chip_of, num_ranges


class Rows(NamedTuple):
    """Strides of a tensor (B, T, E)."""

    image: int
    token: int
    channel: int


class Sizes(NamedTuple):
    """Tokens of an image, tokens in each range of them, channels, features."""

    tokens: int
    per_split: int
    dim: int
    features: int


def num_splits(k: Tensor, table: configs.Table) -> int:
    """Into how many ranges the tokens of an image are divided, so that kernels of ``table`` fill the chip."""
    config = configs.pick(table, k.device, k.dtype)
    blocks = triton.cdiv(k.shape[1], config.blocks["BLOCK_TOKENS"])
    return num_ranges(k.shape[0], blocks, config.resident * chip_of(k.device).multiprocessors)


def make_sizes(k: Tensor, features: int, splits: int, block: int) -> Sizes:
    """Of ``k`` (B, T, E), in ``splits`` ranges of whole blocks."""
    _, tokens, dim = k.shape
    return Sizes(tokens, triton.cdiv(triton.cdiv(tokens, splits), block) * block, dim, features)


@triton.jit
def range_of_tokens():
    """The number of this program's range, counted over all images."""
    return tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)


@triton.jit
def load_rows(ptr, image, tokens, channels, rows, sizes, dtype: tl.constexpr):
    """A tile (tokens, channels) of one image as ``dtype``, zeros beyond the tensor."""
    offs = tokens.to(tl.int64)[:, None] * rows.token + (channels.to(tl.int64) * rows.channel)[None, :]
    mask = (tokens < sizes.tokens)[:, None] & (channels < sizes.dim)[None, :]
    return tl.load(ptr + image.to(tl.int64) * rows.image + offs, mask=mask, other=0.0).to(dtype)


@triton.jit
def store_rows(ptr, values, image, tokens, channels, rows, sizes):
    offs = tokens.to(tl.int64)[:, None] * rows.token + (channels.to(tl.int64) * rows.channel)[None, :]
    mask = (tokens < sizes.tokens)[:, None] & (channels < sizes.dim)[None, :]
    tl.store(ptr + image.to(tl.int64) * rows.image + offs, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_matrix(ptr, rows, columns, num_rows, num_columns, dtype: tl.constexpr):
    """A contiguous matrix (num_rows, num_columns) as ``dtype``, zeros beyond."""
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    return tl.load(ptr + rows[:, None] * num_columns + columns[None, :], mask=mask, other=0.0).to(dtype)


@triton.jit
def store_matrix(ptr, values, rows, columns, num_rows, num_columns):
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(ptr + rows[:, None] * num_columns + columns[None, :], values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_vector(ptr, columns, num_columns, dtype: tl.constexpr):
    return tl.load(ptr + columns, mask=columns < num_columns, other=0.0).to(dtype)


@triton.jit
def store_vector(ptr, values, columns, num_columns):
    tl.store(ptr + columns, values.to(ptr.dtype.element_ty), mask=columns < num_columns)
