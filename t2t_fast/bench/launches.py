"""Every launch of a Triton kernel in T2T-ViT-14 at 224 px, with tensors on the meta device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from t2t_fast.bench import samples
from t2t_fast.bench.samples import T2T_VIT_14, Sample
from t2t_fast.kernels import (
    add_layer_norm,
    configs,
    performer_attention,
    soft_split,
    soft_split_linear,
    token_performer,
)
from t2t_fast.kernels import soft_split_linear_backward as backward
from t2t_fast.kernels.launch import Launch
from t2t_fast.kernels.lay_windows import blocks_launch, lay_windows, pack_launch, packed_like
from t2t_fast.kernels.rows import num_splits
from t2t_fast.kernels.windows import make_view, make_window
from t2t_fast.ops.performer.arguments import Options, Sums
from t2t_fast.ops.soft_splits.reference import as_image

# The soft splits, and which arguments they lack.
SPLITS: dict[str, tuple[str, ...]] = {
    "image to 192": (),
    "tokens to 192": (),
    "tokens to 384": ("norm_weight", "norm_bias"),
}


_STAGES = (("image to 192", "3136 tokens"), ("tokens to 192", "784 tokens"))
_BLOCKS = ("soft_split forward", "image to 192, pixels in blocks")


def _stages(*kernels: str) -> list[tuple[str, str]]:
    """These kernels' launches in both stages."""
    return [(kernel, tokens if "performer" in kernel else split) for split, tokens in _STAGES for kernel in kernels]


# The launches of the tokens-to-token module, whose images require no gradient, by kernel and use.
MODULE = {
    "inference": [
        *(("pack_weight", split) for split in SPLITS),
        _BLOCKS,
        *_stages(
            "soft_split_linear forward",
            "performer_attention summary",
            "performer_attention combine",
            "token_performer forward",
        ),
        ("soft_split_linear forward", "tokens to 384"),
    ],
    "training": [
        *(("pack_weight", split) for split in SPLITS),
        _BLOCKS,
        *_stages(
            "soft_split_linear forward training",
            "performer_attention summary",
            "performer_attention combine",
            "token_performer forward with dropout",
        ),
        ("soft_split_linear forward", "tokens to 384"),
        ("soft_split_linear backward weight", "tokens to 384"),
        ("soft_split_linear backward input", "tokens to 384"),
        *_stages("token_performer backward with dropout", "performer_attention backward key"),
        _BLOCKS,
        *_stages("soft_split_linear backward weight"),
        ("pack_weight", "tokens to 192"),
        ("pack_weight", "tokens to 384"),
        ("soft_split_linear coefficient", "tokens to 192"),
        ("soft_split_linear backward input", "tokens to 192"),
    ],
}


class Shipped(NamedTuple):
    """A launch, the kernel's name and what it is for, and the operations of its matmuls, of all images together."""

    kernel: str
    use: str
    launch: Launch
    flops: int


def shipped_launches(dtype: torch.dtype, batch: int = 8) -> Iterator[Shipped]:
    """All launches of the model for ``batch`` images in ``dtype``."""
    for use, without in SPLITS.items():
        yield from split_launches(dtype, use, without, batch)
    for use in ("3136 tokens", "784 tokens"):
        yield from performer_launches(dtype, use, batch)
    yield from block_launches(dtype, batch)


def meta_sample(op: str, use: str, dtype: torch.dtype, batch: int, without: Sequence[str] = ()) -> Sample:
    """Arguments of ``op`` for ``batch`` images, on the meta device."""
    return samples.make(op, replace(T2T_VIT_14[use], batch=batch), dtype, "meta", without=without)


def split_launches(dtype: torch.dtype, use: str, without: Sequence[str], batch: int) -> Iterator[Shipped]:
    """As :func:`shipped_launches`, of one soft split, with the Linear behind it and without."""
    sizes, sample = T2T_VIT_14[use], meta_sample("soft_split_linear", use, dtype, batch, without)
    weight, has_norm, geometry = sample["weight"], sample["norm_weight"] is not None, sizes.geometry
    image = as_image(sample["x"], sample["grid"])
    windows, walked = lay_windows(image, geometry), lay_windows(image, geometry, in_blocks=False)
    if (launch := blocks_launch(image, windows, geometry.padding)) is not None:
        yield Shipped("soft_split forward", f"{use}, pixels in blocks", launch, 0)
    length = windows.view.grid_h * windows.view.grid_w
    flops = 2 * batch * length * weight.numel()
    tokens, offset = image.new_empty(batch, length, sizes.out), torch.empty(sizes.out, device="meta")
    mean, rstd, coefficient = (torch.empty(batch, length, device="meta") for _ in range(3))
    packed, statistics = packed_like(weight, windows, dtype), soft_split_linear.Statistics(mean, rstd)
    yield Shipped("pack_weight", use, pack_launch(weight, packed, windows), 0)
    for name, kept in (("", None), (" training", statistics))[: 1 + has_norm]:
        launch = soft_split_linear.forward_launch(windows, packed, offset, tokens, kept, has_norm, 1e-5)
        yield Shipped(f"soft_split_linear forward{name}", use, launch, flops)
    splits = backward.num_splits(batch * length, windows, sizes.out, dtype)
    d_weight = torch.empty(splits, sizes.out, windows.window.num_features, device="meta")
    given, d_offset = statistics if has_norm else None, d_weight[:, :, 0]
    launch = backward.backward_weight_launch(tokens, windows, given, d_weight, d_offset, dtype)
    yield Shipped("soft_split_linear backward weight", use, launch, flops)
    means, coefficients = (mean, coefficient) if has_norm else (None, None)
    scaled = tokens.to(backward.scaled_dtype(dtype)) if has_norm else tokens
    repacked = packed_like(weight, walked, dtype)
    launch = backward.backward_input_launch(scaled, repacked, walked, means, coefficients, image)
    yield Shipped("soft_split_linear backward input", use, launch, flops)
    if has_norm:
        launch = backward.coefficient_launch(tokens, tokens, offset, rstd, coefficient, scaled, windows.num_values)
        yield Shipped("soft_split_linear coefficient", use, launch, 0)
    plain = make_window(sizes.channels, *geometry, channels_last=False)
    unfolded, view = image.new_empty(batch, length, plain.num_features), make_view(image, plain)
    yield Shipped("soft_split forward", use, soft_split.forward_launch(image, unfolded, view, plain), 0)
    yield Shipped("soft_split backward", use, soft_split.backward_launch(unfolded, image, view, plain), 0)


def block_launches(dtype: torch.dtype, batch: int) -> Iterator[Shipped]:
    """As :func:`shipped_launches`, of the backbone's blocks."""
    use = "197 tokens"
    rows = meta_sample("add_layer_norm", use, dtype, batch)["x"]
    vector, splits = torch.empty(rows.shape[2], device="meta"), add_layer_norm.num_splits(rows)
    mean, scale = vector.new_empty(rows.shape[:2]), vector.new_empty(len(rows))
    for name, factor, kept in (("", None, None), (" training", scale, (mean, mean))):
        launch = add_layer_norm.forward_launch(rows, rows, factor, vector, vector, rows, rows, kept, 1e-5)
        yield Shipped(f"add_layer_norm forward{name}", use, launch, 0)
    d_vector = vector.new_empty(splits, *vector.shape)
    launch = add_layer_norm.backward_launch(
        rows, rows, rows, (mean, mean), scale, vector, rows, rows, d_vector, d_vector, splits
    )
    yield Shipped("add_layer_norm backward", use, launch, 0)


def sums_for(w: Tensor, *shape: int) -> Sums:
    """Sums over keys, for each image or range of tokens."""
    total = torch.empty(*shape, w.shape[0], device="meta")
    return Sums(total, total, torch.empty(*shape, *w.shape, device="meta"))


def performer_launches(dtype: torch.dtype, use: str, batch: int) -> Iterator[Shipped]:
    """As :func:`shipped_launches`, of the Performer's attention over the views of one (B, T, 3E) tensor."""
    attention = performer_attention
    k, q, v, w = meta_sample("performer_attention", use, dtype, batch).values()
    y, splits = v.new_empty(v.shape), num_splits(v, configs.PERFORMER_ATTENTION)
    each = 2 * v.numel() * len(w)  # a matmul between tokens and features
    parts, whole = sums_for(w, len(v), splits), sums_for(w, len(v))
    yield Shipped("performer_attention summary", use, attention.summary_launch(k, v, w, parts), 2 * each)
    fused = configs.has_config(configs.TOKEN_PERFORMER, v.device, dtype)
    proj_weight = torch.empty(v.shape[2], v.shape[2], device="meta") if fused else None
    launch = attention.combine_launch(parts, whole, proj_weight, whole.summary if fused else None, dtype)
    yield Shipped("performer_attention combine", use, launch, fused * 2 * whole.summary.numel() * v.shape[2])
    yield Shipped("performer_attention query", use, attention.query_launch(q, w, whole, y, 1e-8), 2 * each)
    parts = sums_for(w, len(v), num_splits(v, configs.PERFORMER_ATTENTION_BACKWARD))
    for name, needs_dw in (("", False), (" with dw", True)):
        dw = parts.summary if needs_dw else None
        launch = attention.backward_query_launch(y, q, w, whole, y, parts.total, parts.summary, dw, 1e-8)
        yield Shipped(f"performer_attention backward query{name}", use, launch, (4 + needs_dw) * each)
        splits = num_splits(v, attention.key_table(needs_dw))
        dw = sums_for(w, len(v), splits).summary if needs_dw else None
        launch = attention.backward_key_launch(k, v, w, whole, y, y, dw, splits)
        yield Shipped(f"performer_attention backward key{name}", use, launch, (4 + needs_dw) * each)
    yield from token_performer_launches(use, q, v, w, y, whole)


def token_performer_launches(use: str, q: Tensor, v: Tensor, w: Tensor, y: Tensor, whole: Sums) -> Iterator[Shipped]:
    """As :func:`shipped_launches`, of the layer behind the attention, without and with its default dropout."""
    dtype = v.dtype
    if not configs.has_config(configs.TOKEN_PERFORMER, v.device, dtype):
        return
    weights = meta_sample("token_performer", use, torch.float32, len(v))
    layer = token_performer.FoldedLayer(*(weights[name] for name in token_performer.FoldedLayer._fields))
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    features, hidden = (2 * v.numel() * size for size in (len(w), len(layer.fc1_weight)))
    plain, dropout = Options(0.0, 0.0, 1e-8, 1e-5), Options(0.1, 0.1, 1e-8, 1e-5)
    for name, given, options in (("", None, plain), (" with dropout", seed, dropout)):
        launch = token_performer.forward_launch(q, v, w, whole, y, layer, given, dtype, options)
        yield Shipped(f"token_performer forward{name}", use, launch, 2 * features + 2 * hidden)
        if not configs.has_config(configs.TOKEN_PERFORMER_BACKWARD, v.device, dtype):
            continue
        parts = sums_for(w, len(v), num_splits(v, configs.TOKEN_PERFORMER_BACKWARD))
        launch = token_performer.backward_launch(
            y, q, v, w, whole, layer, given, y, y, parts.total, parts.summary, layer, dtype, options
        )
        yield Shipped(f"token_performer backward{name}", use, launch, 5 * features + 5 * hidden)
