"""A whole standard block: library operations in a row, nothing checked or chosen op by op.

The ops of :mod:`t2t_fast.ops` check their arguments and choose an implementation in every call. A block whose parts are
as they were made needs that once: :class:`BlockWeights` is what came out, and :func:`whole_block` the formula.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.branch import Branch, add_branch
from ..common.norm import Norm
from ..softmax_attention.aten import attend
from .aten import is_small, multiply, multiply_packed


class Product(NamedTuple):
    """A Linear; ``onednn`` is its weight for oneDNN's operator, packed or not, where that operator is used."""

    weight: Tensor
    bias: Tensor | None
    onednn: Tensor | None


class BlockWeights(NamedTuple):
    """Everything that a standard block multiplies by."""

    norm1: Norm
    qkv: Product
    proj: Product
    norm2: Norm
    fc1: Product
    fc2: Product
    num_heads: int
    scale: float


def whole_block(x: Tensor, block: BlockWeights, scales: tuple[Tensor | None, Tensor | None] = (None, None)) -> Tensor:
    """``x = x + scales[0] proj(attention(qkv(norm1(x))))``, then ``x + scales[1] fc2(gelu(fc1(norm2(x))))`` (§3.2).

    Args:
        x: Tokens (B, N, C), not empty, in the dtype and on the device of the weights.
        block: The weights.
        scales: Factors per image (B,) of the two branches, or None: stochastic depth's.

    Returns:
        (B, N, C).
    """
    batch, tokens, _ = x.shape
    qkv = _multiply(_normalize(x, block.norm1), block.qkv)
    q, k, v = qkv.view(batch, tokens, 3, block.num_heads, -1).unbind(2)
    y = (
        attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block.scale)
        .transpose(1, 2)
        .reshape(batch, tokens, -1)
    )
    x = _add(_multiply(y, block.proj), x, scales[0])
    y = _multiply(_multiply(_normalize(x, block.norm2), block.fc1, gelu=True), block.fc2)
    return _add(y, x, scales[1])


def _normalize(x: Tensor, norm: Norm) -> Tensor:
    return torch.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def _multiply(x: Tensor, linear: Product, gelu: bool = False) -> Tensor:
    if linear.onednn is None or is_small(x, linear.weight):
        y = F.linear(x, linear.weight, linear.bias)
    elif torch.is_grad_enabled():
        y = multiply(x, linear.weight, linear.bias, False)
    else:
        return multiply_packed(x, linear.onednn, linear.bias, gelu)
    if not gelu:
        return y
    return F.gelu(y) if y.requires_grad else torch.ops.aten.gelu_.default(y)


def _add(y: Tensor, residual: Tensor, scale: Tensor | None) -> Tensor:
    """``residual + scale y``; in the memory of ``y``, which nobody else has, if autograd does not need it."""
    if scale is None and y.dtype == residual.dtype and not (y.requires_grad or residual.requires_grad):
        return y.add_(residual)
    return add_branch(y, Branch(residual, scale))
