"""A soft split with its Performer token layer: in inference one kernel up to the sums over the keys, and one behind.

Where gradients are wanted, or a layer does not fit, soft_split_linear and token_performer follow one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..aten.soft_split_linear import fold_norm
from ..numerics import compute_dtype, no_autocast, product_dtype
from ..ops.common.autograd import wants_gradient
from ..reference.soft_split import as_image, window_grid
from . import performer_attention, soft_split_linear, token_performer
from .soft_split_linear import GEOMETRY, locate


def forward(split: tuple[Any, ...], layer: tuple[Any, ...]) -> Tensor:
    """The arguments of soft_split_linear, and those of token_performer behind its first; returns (B, L, E)."""
    if not_joined(split, layer):
        return token_performer.forward(soft_split_linear.forward(*split), *layer)
    x, weight, bias, norm_weight, norm_bias, *geometry, grid, norm1_eps, _ = split
    w, proj_weight, proj_bias, norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias = layer[:9]
    _, _, eps, norm2_eps = layer[9:]
    dtype = product_dtype(x)
    with no_autocast(x):
        folded = fold_norm(weight, bias, norm_weight, norm_bias, compute_dtype(x, weight))
        mlp = (*token_performer.fold(norm2_weight, norm2_bias, fc1_weight, fc1_bias, x), fc2_weight, fc2_bias)
        tensors = (as_image(x, grid), *folded, w, proj_weight, proj_bias, *mlp)
        return _soft_split_performer(*tensors, dtype, *geometry, norm1_eps, eps, norm2_eps)


def not_joined(split: tuple[Any, ...], layer: tuple[Any, ...]) -> str | None:
    """Why soft_split_linear and token_performer run one after the other; None if they are joined."""
    x, norm_weight, w, fc1_weight = split[0], split[3], layer[0], layer[5]
    if norm_weight is None and not split[-1]:
        return "there is no first LayerNorm"
    if layer[9] or layer[10]:
        return "there is dropout"
    if wants_gradient(*(t for t in (*split, *layer) if isinstance(t, Tensor))):
        return "gradients are wanted"
    return token_performer.not_fused(x.device, product_dtype(x), w, fc1_weight, False)


def detail(split: tuple[Any, ...], layer: tuple[Any, ...]) -> str:
    """Whether a call is joined, or why not."""
    reason = not_joined(split, layer)
    return f"soft_split_linear, then token_performer: {reason}" if reason else "joined"


def why_not(split: tuple[Any, ...], layer: tuple[Any, ...]) -> str | None:
    """None, or why not."""
    x, w, proj_weight, *rest = split[0], *layer
    reason = soft_split_linear.why_not(*split)
    return reason or token_performer.cannot_run_layer(x, product_dtype(x), w, proj_weight, *rest)


def why_not_auto(split: tuple[Any, ...], layer: tuple[Any, ...]) -> str | None:
    """None, or why ``auto`` passes it over."""
    return soft_split_linear.why_not_auto(*split)


@torch.library.custom_op(
    "t2t_fast::soft_split_performer",
    mutates_args=(),
    schema="(Tensor image, Tensor weight, Tensor offset, Tensor w, Tensor proj_weight, Tensor proj_bias, "
    "Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, ScalarType dtype, "
    f"{GEOMETRY}, float norm1_eps, float eps, float norm2_eps) -> Tensor",
)
def _soft_split_performer(
    image: Tensor,
    weight: Tensor,
    offset: Tensor,
    w: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    dtype: torch.dtype,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    norm1_eps: float,
    eps: float,
    norm2_eps: float,
) -> Tensor:
    """Tokens (B, L, E) of ``dtype``."""
    from ..kernels import soft_split_performer as kernels
    from ..kernels import token_performer as layer_kernels
    from ..kernels.rows import num_splits
    from ..kernels.soft_split_linear import pack_weight

    window, view = locate(image, kernel_size, stride, padding)
    v, w, device = _tokens(image, weight, dtype, (view.grid_h, view.grid_w)), w.contiguous(), image.device
    splits = num_splits(v)
    parts = performer_attention.sums_of(v, w, splits)
    exponents = parts[0].new_empty(*v.shape[:2], w.shape[0])
    packed = pack_weight(weight, window, dtype)
    kernels.forward_launch(image, packed, offset.contiguous(), w, exponents, v, parts, view, window, norm1_eps).run(
        device
    )
    largest, total, summary = performer_attention.combine(*parts)
    sums = (largest, total, token_performer.project(summary, proj_weight))
    layer = layer_kernels.Layer(*(t.contiguous() for t in (proj_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)))
    nothing, out = layer_kernels.make_dropout(None, 0.0, 0.0), torch.empty_like(v)
    layer_kernels.forward_launch(
        exponents, v, w, sums, out, layer, nothing, dtype, eps, norm2_eps, splits, from_exponents=True
    ).run(device)
    return out


def _tokens(image: Tensor, weight: Tensor, dtype: torch.dtype, grid: Sequence[int]) -> Tensor:
    return image.new_empty(image.shape[0], grid[0] * grid[1], weight.shape[0] // 3, dtype=dtype)


@_soft_split_performer.register_fake
def _(image: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    dtype, *geometry = rest[8:12]
    return _tokens(image, weight, dtype, window_grid(image.shape[2:], *geometry))


@register_flop_formula(torch.ops.t2t_fast.soft_split_performer)
def _flops(
    image: Any,
    weight: Any,
    offset: Any,
    w: Any,
    proj_weight: Any,
    proj_bias: Any,
    fc1_weight: Any,
    *args: Any,
    out_shape: Any,
    **kwargs: Any,
) -> int:
    """Those of soft_split_linear and token_performer."""
    products = 2 * out_shape[0] * out_shape[1] * weight[0] * weight[1]
    return products + token_performer.flops(out_shape, w, fc1_weight)
