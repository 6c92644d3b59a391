"""A whole standard block as library operations in a row.

The ops of :mod:`t2t_fast.ops` check their arguments and choose an implementation in every call, several times a block.
For an unmodified block the layer checks once, and hands :class:`BlockWeights` to :func:`whole_block`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.branch import Branch, add_branch
from ..common.norm import Norm
from ..softmax_attention import aten, native
from .aten import is_small, multiply_packed, multiply_with_gradient


class LinearWeights(NamedTuple):
    """A Linear; ``onednn`` is its weight for oneDNN's operator, packed or not, where that operator is used."""

    weight: Tensor  # (out, C)
    bias: Tensor | None  # (out,)
    onednn: Tensor | None


class BlockWeights(NamedTuple):
    """What a standard block computes with.

    Where queries are wanted of some tokens only, ``qkv`` is in two parts: ``query``, and ``qkv`` with the other rows.
    """

    norm1: Norm
    query: LinearWeights | None
    qkv: LinearWeights
    proj: LinearWeights
    norm2: Norm
    fc1: LinearWeights
    fc2: LinearWeights
    num_heads: int
    head_dim: int
    scale: float
    native: bool  # whether the extension may multiply


def whole_block(
    x: Tensor,
    block: BlockWeights,
    scales: tuple[Tensor | None, Tensor | None] = (None, None),
    num_tokens: int | None = None,
) -> Tensor:
    """``x = x + scales[0] proj(attention(qkv(norm1(x))))``, then ``x + scales[1] fc2(gelu(fc1(norm2(x))))`` (§3.2).

    Args:
        x: Tokens (B, N, C), not empty, in the dtype and on the device of the weights.
        block: The weights.
        scales: Factors per image (B,) of the two branches, or None: stochastic depth's.
        num_tokens: Compute the first so many tokens of the result alone; ``block`` then has a ``query``.

    Returns:
        (B, N, C), or (B, num_tokens, C).
    """
    y = _multiply(_attend(x, block, num_tokens), block.proj)
    x = _add(y, x if num_tokens is None else x[:, :num_tokens], scales[0])
    hidden = _multiply(_normalize(x, block.norm2), block.fc1, gelu=True)
    return _add(_multiply(hidden, block.fc2), x, scales[1])


def _attend(x: Tensor, block: BlockWeights, num_tokens: int | None) -> Tensor:
    """``attention(qkv(norm1(x)))``; a function of its own, so that q, k and v are freed before the MLP runs."""
    x = _normalize(x, block.norm1)
    parts = _heads(_multiply(x, block.qkv), block)
    if block.query is not None:
        parts = *_heads(_multiply(x[:, :num_tokens], block.query), block), *parts
    q, k, v = parts
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    attend = native.attend if block.native and native.are_many(q, k) else aten.attend
    y = attend(q, k, v, block.scale)
    return y.transpose(1, 2).flatten(2)


def _heads(x: Tensor, block: BlockWeights) -> tuple[Tensor, ...]:
    """(B, N, n C) to n tensors (B, N, heads, C / heads)."""
    return x.view(*x.shape[:2], -1, block.num_heads, block.head_dim).unbind(2)


def _normalize(x: Tensor, norm: Norm) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def _multiply(x: Tensor, linear: LinearWeights, gelu: bool = False) -> Tensor:
    if linear.onednn is None or is_small(x, linear.weight):
        y = F.linear(x, linear.weight, linear.bias)
    elif torch.is_grad_enabled():
        y = multiply_with_gradient(x, linear.weight, linear.bias)
    else:
        return multiply_packed(x, linear.onednn, linear.bias, gelu)
    if not gelu:
        return y
    return F.gelu(y) if y.requires_grad else torch.ops.aten.gelu_.default(y)


def _add(y: Tensor, residual: Tensor, scale: Tensor | None) -> Tensor:
    """``residual + scale y``; in place in ``y``, a fresh temporary, if no gradient is needed."""
    if scale is None and y.dtype == residual.dtype and not (y.requires_grad or residual.requires_grad):
        return y.add_(residual)
    return add_branch(y, Branch(residual, scale))
