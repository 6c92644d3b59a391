"""Every launch of a Triton kernel in T2T-ViT-14 at 224 px, with tensors on the meta device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

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
    soft_split_performer,
    token_performer,
)
from t2t_fast.kernels.launch import Launch
from t2t_fast.kernels.windows import View, Window, make_view, make_window
from t2t_fast.ops.performer.arguments import Options, Sums
from t2t_fast.ops.soft_splits.reference import as_image

# The soft splits, and which arguments they lack.
SPLITS: dict[str, tuple[str, ...]] = {
    "image to 192": (),
    "tokens to 192": (),
    "tokens to 384": ("norm_weight", "norm_bias"),
}


def shipped_launches(dtype: torch.dtype) -> Iterator[tuple[str, str, Launch, bool]]:
    """(kernel, use, launch, whether it has matmuls) of all launches of the model in ``dtype``."""
    for use, without in SPLITS.items():
        yield from split_launches(dtype, use, without)
    yield from performer_launches(dtype)
    yield from block_launches(dtype)


def meta_sample(op: str, use: str, dtype: torch.dtype = torch.float32, without: Sequence[str] = ()) -> Sample:
    """Arguments of ``op`` for eight images, on the meta device."""
    return samples.make(op, replace(T2T_VIT_14[use], batch=8), dtype, "meta", without=without)


def split_launches(dtype: torch.dtype, use: str, without: Sequence[str]) -> Iterator[tuple[str, str, Launch, bool]]:
    """As :func:`shipped_launches`, of one soft split, with the Linear behind it and without."""
    sizes, sample = T2T_VIT_14[use], meta_sample("soft_split_linear", use, dtype, without)
    weight, has_norm = sample["weight"], sample["norm_weight"] is not None
    image = as_image(sample["x"], sample["grid"])
    window = make_window(sizes.channels, *sizes.geometry, sizes.as_tokens)
    view = make_view(image, window)
    batch, length = image.shape[0], view.grid_h * view.grid_w
    tokens, offset = image.new_empty(batch, length, sizes.out), torch.empty(sizes.out, device="meta")
    mean, rstd, coefficient = (torch.empty(batch, length, device="meta") for _ in range(3))
    packed, statistics = soft_split_linear.pack_weight(weight, window, dtype), soft_split_linear.Statistics(mean, rstd)
    for name, kept in (("", None), (" training", statistics))[: 1 + has_norm]:
        launch = soft_split_linear.forward_launch(image, packed, offset, tokens, kept, view, window, has_norm, 1e-5)
        yield f"soft_split_linear forward{name}", use, launch, True
    d_weight = torch.empty(4, *weight.shape, device="meta")
    given = statistics if has_norm else None
    d_offset = d_weight[:, :, 0]
    launch = soft_split_linear.backward_weight_launch(tokens, image, given, d_weight, d_offset, dtype, view, window)
    yield "soft_split_linear backward weight", use, launch, True
    launch = soft_split_linear.backward_input_launch(
        tokens, packed, image, given, coefficient if has_norm else None, image, view, window
    )
    yield "soft_split_linear backward input", use, launch, True
    if has_norm:
        launch = soft_split_linear.coefficient_launch(tokens, tokens, offset, rstd, coefficient, window.num_features)
        yield "soft_split_linear coefficient", use, launch, False
        if configs.has_config(configs.SOFT_SPLIT_PERFORMER, image.device, dtype):
            yield "soft_split_performer", use, joined_launch(image, packed, offset, use, view, window), True
    plain = window._replace(channels_last=False)
    unfolded = image.new_empty(batch, length, window.num_features)
    yield "soft_split forward", use, soft_split.forward_launch(image, unfolded, view, plain), False
    yield "soft_split backward", use, soft_split.backward_launch(unfolded, image, view, plain), False


def block_launches(dtype: torch.dtype) -> Iterator[tuple[str, str, Launch, bool]]:
    """As :func:`shipped_launches`, of the backbone's blocks."""
    use, splits = "197 tokens", 4
    rows, vector = meta_sample("add_layer_norm", use, dtype)["x"], meta_sample("add_layer_norm", use)["norm_weight"]
    mean, scale = vector.new_empty(rows.shape[:2]), vector.new_empty(len(rows))
    for name, factor, kept in (("", None, None), (" training", scale, (mean, mean))):
        launch = add_layer_norm.forward_launch(rows, rows, factor, vector, vector, rows, rows, kept, 1e-5)
        yield f"add_layer_norm forward{name}", use, launch, False
    d_vector = vector.new_empty(splits, *vector.shape)
    launch = add_layer_norm.backward_launch(
        rows, rows, rows, (mean, mean), scale, vector, rows, rows, d_vector, d_vector, splits
    )
    yield "add_layer_norm backward", use, launch, False


def joined_launch(image: Tensor, packed: Tensor, offset: Tensor, use: str, view: View, window: Window) -> Launch:
    w, splits = meta_sample("soft_split_performer", use, image.dtype)["w"], 4
    v = image.new_empty(len(image), view.grid_h * view.grid_w, w.shape[1])
    parts = sums_for(w, len(image), splits)
    exponents = parts.total.new_empty(*v.shape[:2], w.shape[0])
    return soft_split_performer.forward_launch(image, packed, offset, w, exponents, v, parts, view, window, 1e-5)


def sums_for(w: Tensor, *shape: int) -> Sums:
    """Sums over keys, for each image or range of tokens."""
    total = torch.empty(*shape, w.shape[0], device="meta")
    return Sums(total, total, torch.empty(*shape, *w.shape, device="meta"))


def performer_launches(dtype: torch.dtype) -> Iterator[tuple[str, str, Launch, bool]]:
    """As :func:`shipped_launches`, of the Performer's attention over the views of one (B, T, 3E) tensor."""
    use, splits, attention = "3136 tokens", 4, performer_attention
    k, q, v, w = meta_sample("performer_attention", use, dtype).values()
    y = v.new_empty(v.shape)
    parts, whole = sums_for(w, len(v), splits), sums_for(w, len(v))
    yield "performer_attention summary", use, attention.summary_launch(k, v, w, parts), True
    yield "performer_attention query", use, attention.query_launch(q, w, whole, y, 1e-8, splits), True
    for name, dw in (("", None), (" with dw", parts.summary)):
        launch = attention.backward_query_launch(y, q, w, whole, y, parts.total, parts.summary, dw, 1e-8)
        yield f"performer_attention backward query{name}", use, launch, True
        launch = attention.backward_key_launch(k, v, w, whole, y, y, dw, splits)
        yield f"performer_attention backward key{name}", use, launch, True
    yield from token_performer_launches(use, q, v, w, y, whole, parts)


def token_performer_launches(
    use: str, q: Tensor, v: Tensor, w: Tensor, y: Tensor, whole: Sums, parts: Sums
) -> Iterator[tuple[str, str, Launch, bool]]:
    """As :func:`shipped_launches`, of the layer behind the attention, without and with its default dropout."""
    dtype, splits = v.dtype, parts.total.shape[1]
    if not configs.has_config(configs.TOKEN_PERFORMER, v.device, dtype):
        return
    weights = meta_sample("token_performer", use)
    layer = token_performer.FoldedLayer(*(weights[name] for name in token_performer.FoldedLayer._fields))
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    exponents = torch.empty(*y.shape[:2], w.shape[0], device="meta")
    plain, dropout = Options(0.0, 0.0, 1e-8, 1e-5), Options(0.1, 0.1, 1e-8, 1e-5)
    launch = token_performer.forward_launch(
        exponents, y, w, whole, y, layer, None, dtype, plain, splits, from_exponents=True
    )
    yield "token_performer forward from exponents", use, launch, True
    for name, given, options in (("", None, plain), (" with dropout", seed, dropout)):
        launch = token_performer.forward_launch(q, v, w, whole, y, layer, given, dtype, options, splits)
        yield f"token_performer forward{name}", use, launch, True
        if not configs.has_config(configs.TOKEN_PERFORMER_BACKWARD, v.device, dtype):
            continue
        launch = token_performer.backward_launch(
            y, q, v, w, whole, layer, given, y, y, parts.total, parts.summary, layer, dtype, options
        )
        yield f"token_performer backward{name}", use, launch, True
