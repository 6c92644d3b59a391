"""``torch.ops.t2t_fast.attention``, whose code is in ``csrc/attention``: shapes, gradients and FLOPs.

Scores of a block of queries and keys, their softmax and the weighted sum of the values stay in a core's cache. Backward
keeps one number per query and computes the weights again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ...numerics import no_autocast, product_dtype
from ..common import extension
from ..common.autograd import differentiable_backward, in_dispatch_mode, wants_gradient
from . import reference

_FEW = 1 << 12  # scores below which the library's kernel is as fast


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float) -> Tensor:
    """(B, heads, M, D), and twice (B, heads, N, D), to (B, heads, M, D)."""
    dtype = product_dtype(q)
    with no_autocast(q):
        q, k, v = (t.to(dtype) for t in (q, k, v))
        return attend(q, k, v, scale)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """:func:`attention` for tensors of one dtype outside autocast."""
    output, _ = torch.ops.t2t_fast.attention(q, k, v, scale, wants_gradient(q, k, v))
    return output


def why_not_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float) -> str | None:
    """None, or why it cannot run."""
    if dropout_p > 0:
        return "dropout on the attention weights needs library operations"
    if q.device.type == "cuda":
        return "the extension has no attention for GPUs"
    reason = extension.why_not(q, k, v)
    if reason is None and not extension.multiplies(q.device.type, product_dtype(q)):
        return extension.why_not_multiply(product_dtype(q))
    return reason


def why_not_auto_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float) -> str | None:
    """None, or why ``auto`` passes it over."""
    if in_dispatch_mode():
        return "a TorchDispatchMode knows library operations"
    if not torch.compiler.is_compiling() and not are_many(q, k):
        return "there are few scores: the library's kernel is as fast"
    return None


def are_many(q: Tensor, k: Tensor) -> bool:
    """Whether there are so many scores that :func:`attention` is faster than the library's kernel."""
    return q.numel() * k.shape[2] >= _FEW * q.shape[3]


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, differentiate: bool) -> tuple[Tensor, Tensor]:
    images, heads, tokens, _ = q.shape
    lse = q.new_empty(images if differentiate else 0, heads, tokens, dtype=torch.float32)
    return _empty_like(q), lse


def _fake_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(q), _empty_like(k), _empty_like(v)


def _empty_like(tokens: Tensor) -> Tensor:
    """The strides that the operators give their results: a token's heads are side by side."""
    images, heads, count, channels = tokens.shape
    return tokens.new_empty(images, count, heads, channels).transpose(1, 2)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tokens, ctx.scale, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tokens, *output)


def _differentiate(ctx: Any, grad: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, output, lse = ctx.saved_tensors
    if torch.is_grad_enabled():
        inputs = (q, k, v, ctx.scale, 0.0)
        dq, dk, dv, *_ = differentiable_backward(reference.attention, inputs, grad)
    else:
        dq, dk, dv = torch.ops.t2t_fast.attention_backward(grad, q, k, v, output, lse, ctx.scale)
    return dq, dk, dv, None, None


def _flops_of_attention(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> int:
    return 4 * q.numel() * k.shape[2]


def _flops_of_attention_backward(grad: Tensor, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> int:
    return 10 * q.numel() * k.shape[2]


if extension.module is not None:
    torch.library.register_fake("t2t_fast::attention", _fake_attention)
    torch.library.register_fake("t2t_fast::attention_backward", _fake_attention_backward)
    torch.library.register_autograd("t2t_fast::attention", _differentiate, setup_context=_keep)
    register_flop_formula(torch.ops.t2t_fast.attention, get_raw=True)(_flops_of_attention)
    register_flop_formula(torch.ops.t2t_fast.attention_backward, get_raw=True)(_flops_of_attention_backward)
