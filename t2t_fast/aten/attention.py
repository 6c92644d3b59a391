"""Softmax attention through ``scaled_dot_product_attention``: the N x N matrix is never stored.

In bfloat16 on a CPU, inference goes through two products and a softmax over blocks of scores that stay in the cache:
there the library's fused kernel is no faster than in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import no_autocast, product_dtype
from .autograd import may_overwrite, wants_gradient

_BLOCK = 1 << 20  # scores at a time: measured best of 2**18 to 2**22


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float) -> Tensor:
    """(B, heads, N, D) each; returns the same shape."""
    if dropout_p == 0 and _in_blocks(q, k, v):
        dtype = product_dtype(q)
        with no_autocast(q):
            return _by_blocks(q.to(dtype), k.to(dtype), v.to(dtype), scale)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)


def _in_blocks(*tensors: Tensor) -> bool:
    if torch.compiler.is_compiling() or wants_gradient(*tensors) or not may_overwrite(*tensors):
        return False  # the number of blocks must not enter a graph
    return tensors[0].device.type == "cpu" and product_dtype(tensors[0]) == torch.bfloat16


def _by_blocks(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    batch, heads, tokens, dim = q.shape
    images = min(batch, max(1, _BLOCK // max(1, heads * tokens * tokens)))
    rows = min(tokens, max(1, _BLOCK // max(1, images * heads * tokens)))
    out = q.new_empty(batch, tokens, heads, dim).transpose(1, 2)
    block = [q.new_empty(images * heads, rows, tokens) for _ in range(2)]
    for first in range(0, batch, max(1, images)):
        q_part, k_part, v_part, out_part = (t[first : first + images] for t in (q, k, v, out))
        keys, values = k_part.flatten(0, 1).transpose(1, 2), v_part.flatten(0, 1)
        for queries, target in zip(q_part.split(rows, 2), out_part.split(rows, 2), strict=True):
            queries = queries.flatten(0, 1)
            scores, weights = (t[: queries.shape[0], : queries.shape[1]] for t in block)
            torch.baddbmm(scores, queries, keys, beta=0, alpha=scale, out=scores)
            torch.softmax(scores, dim=-1, out=weights)
            target.copy_(torch.bmm(weights, values).view_as(target))
    return out
