"""Every launch of a Triton kernel in T2T-ViT-14 at 224 px, with tensors on the meta device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

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

# The uses in t2t_vit_14 at 224 px: channels, side, kernel, stride, padding, out, as tokens, with a LayerNorm.
USES = {
    "image to 192": (3, 224, 7, 4, 2, 192, False, True),
    "tokens to 192": (64, 56, 3, 2, 1, 192, True, True),
    "tokens to 384": (64, 28, 3, 2, 1, 384, True, False),
}


def shipped_launches(dtype: torch.dtype) -> Iterator[tuple[str, str, Launch, bool]]:
    """(kernel, use, launch, whether it has matmuls) of all launches of the model in ``dtype``."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    batch = 8
    for use, (channels, side, kernel, stride, padding, out, as_tokens, norm) in USES.items():
        image = empty(batch, channels, side, side)
        if as_tokens:
            image = image.contiguous(memory_format=torch.channels_last)
        window = make_window(channels, (kernel,) * 2, (stride,) * 2, (padding,) * 2, as_tokens)
        view = make_view(image, window)
        length = view.grid_h * view.grid_w
        tokens, offset = empty(batch, length, out), empty(out, dtype=torch.float32)
        mean, rstd, coefficient = (empty(batch, length, dtype=torch.float32) for _ in range(3))
        packed = soft_split_linear.pack_weight(empty(out, window.num_features), window, dtype)
        statistics = soft_split_linear.Statistics(mean, rstd)
        for name, kept in (("", None), (" training", statistics))[: 1 + norm]:
            launch = soft_split_linear.forward_launch(image, packed, offset, tokens, kept, view, window, norm, 1e-5)
            yield f"soft_split_linear forward{name}", use, launch, True
        d_weight = empty(4, out, window.num_features, dtype=torch.float32)
        given = statistics if norm else None
        launch = soft_split_linear.backward_weight_launch(
            tokens, image, given, d_weight, d_weight[:, :, 0], dtype, view, window
        )
        yield "soft_split_linear backward weight", use, launch, True
        launch = soft_split_linear.backward_input_launch(
            tokens, packed, image, given, coefficient if norm else None, image, view, window
        )
        yield "soft_split_linear backward input", use, launch, True
        if norm:
            launch = soft_split_linear.coefficient_launch(
                tokens, tokens, offset, rstd, coefficient, window.num_features
            )
            yield "soft_split_linear coefficient", use, launch, False
            if configs.has_config(configs.SOFT_SPLIT_PERFORMER, image.device, dtype):
                yield "soft_split_performer", use, joined_launch(image, packed, offset, dtype, view, window), True
        plain = window._replace(channels_last=False)
        unfolded = empty(batch, length, window.num_features)
        yield "soft_split forward", use, soft_split.forward_launch(image, unfolded, view, plain), False
        yield "soft_split backward", use, soft_split.backward_launch(unfolded, image, view, plain), False
    yield from performer_launches(dtype)
    yield from block_launches(dtype)


def block_launches(dtype: torch.dtype) -> Iterator[tuple[str, str, Launch, bool]]:
    """As :func:`shipped_launches`, of the backbone's blocks: T2T-ViT-14, 197 tokens of 384 channels."""
    batch, tokens, dim = 8, 197, 384
    rows = torch.empty(batch, tokens, dim, dtype=dtype, device="meta")
    statistics = torch.empty(batch, tokens, device="meta"), torch.empty(batch, tokens, device="meta")
    vector, scale, splits = torch.empty(dim, device="meta"), torch.empty(batch, device="meta"), 4
    for name, factor, kept in (("", None, None), (" training", scale, statistics)):
        launch = add_layer_norm.forward_launch(rows, rows, factor, vector, vector, rows, rows, kept, 1e-5)
        yield f"add_layer_norm forward{name}", "197 tokens", launch, False
    d_vector = torch.empty(splits, dim, device="meta")
    launch = add_layer_norm.backward_launch(
        rows, rows, rows, statistics, scale, vector, rows, rows, d_vector, d_vector, splits
    )
    yield "add_layer_norm backward", "197 tokens", launch, False


def joined_launch(
    image: Tensor, packed: Tensor, offset: Tensor, dtype: torch.dtype, view: View, window: Window
) -> Launch:
    batch, length, dim, features, splits = image.shape[0], view.grid_h * view.grid_w, packed.shape[0] // 3, 32, 4
    total = torch.empty(batch, splits, features, device="meta")
    parts = Sums(total, total, torch.empty(*total.shape, dim, device="meta"))
    v, exponents = torch.empty(batch, length, dim, dtype=dtype, device="meta"), total.new_empty(batch, length, features)
    w = torch.empty(features, dim, dtype=dtype, device="meta")
    return soft_split_performer.forward_launch(image, packed, offset, w, exponents, v, parts, view, window, 1e-5)


def performer_launches(dtype: torch.dtype) -> Iterator[tuple[str, str, Launch, bool]]:
    """As :func:`shipped_launches`, of the Performer's attention over the views of one (B, T, 3E) tensor."""
    batch, length, dim, features, splits = 8, 3136, 64, 32, 4
    k, q, v = torch.empty(batch, length, 3 * dim, dtype=dtype, device="meta").chunk(3, dim=-1)
    y = torch.empty(batch, length, dim, dtype=dtype, device="meta")
    w = torch.empty(features, dim, dtype=dtype, device="meta")

    def sums(*shape: int) -> Sums:
        total = torch.empty(*shape, features, device="meta")
        return Sums(total, total, torch.empty(*shape, features, dim, device="meta"))

    parts, whole = sums(batch, splits), sums(batch)
    use, attention = "3136 tokens", performer_attention
    yield "performer_attention summary", use, attention.summary_launch(k, v, w, parts), True
    yield "performer_attention query", use, attention.query_launch(q, w, whole, y, 1e-8, splits), True
    for name, dw in (("", None), (" with dw", parts.summary)):
        launch = attention.backward_query_launch(y, q, w, whole, y, parts.total, parts.summary, dw, 1e-8)
        yield f"performer_attention backward query{name}", use, launch, True
        launch = attention.backward_key_launch(k, v, w, whole, y, y, dw, splits)
        yield f"performer_attention backward key{name}", use, launch, True
    yield from token_performer_launches(dtype, q, v, w, y, whole, parts)


def token_performer_launches(
    dtype: torch.dtype, q: Tensor, v: Tensor, w: Tensor, y: Tensor, whole: Sums, parts: Sums
) -> Iterator[tuple[str, str, Launch, bool]]:
    """As :func:`shipped_launches`, of the layer behind the attention, without and with its default dropout."""
    if not configs.has_config(configs.TOKEN_PERFORMER, v.device, dtype):
        return
    use, dim, splits = "3136 tokens", y.shape[2], parts.total.shape[1]
    layer = token_performer.FoldedLayer(
        *(torch.empty(*shape, device="meta") for shape in ((dim,), (dim, dim), (dim,), (dim, dim), (dim,)))
    )
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
