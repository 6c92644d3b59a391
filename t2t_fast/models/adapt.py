"""Fit weights to a T2T-ViT with another head, image size or number of input channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import FIRST_KERNEL, source_channels, square_side
from .layouts import CheckpointError
from .pos_embed import resize_table, sinusoid_table


class LoudNote(str):
    """A note about a change to the weights that a user should see: logged as a warning."""


def adapt_state_dict(state_dict: Mapping[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Fit weights to a T2T-ViT with another head, image size or number of input channels.

    * Head of another number of classes, or none: the model's own is kept; a model without one drops it.
    * Position table of another square grid: bicubic resize to ``model.grid_size``, class token untouched. A table
      that was never resized is taken as a square grid's, even where a non-square model has as many tokens.
    * Input channels: the repeat-and-rescale rule of timm, with the first LayerNorm's affine folded into the projection
      so that one channel means exactly the original network on the grey image repeated.

    Other names and shapes pass as they are, for ``load_state_dict`` to report.

    Args:
        state_dict: Official names to tensors; not modified.
        model: The model to fit (its ``state_dict()``, ``grid_size``, ``num_classes``, ``tokens_to_token.in_chans``).

    Returns:
        The adapted state dict and one note per change; a :class:`LoudNote` where the function computed changes.

    Raises:
        CheckpointError: A position table of a non-square grid would have to be resized.
    """
    adapted = dict(state_dict)
    net: Any = model
    own = model.state_dict()
    notes = [
        *_adapt_head(adapted, own, net.num_classes),
        *_adapt_pos_embed(adapted, own, net.grid_size),
        *_adapt_in_chans(adapted, net.tokens_to_token.in_chans),
    ]
    return adapted, notes


def _adapt_head(adapted: dict[str, Tensor], own: Mapping[str, Tensor], num_classes: int) -> list[str]:
    given = [name for name in adapted if name.startswith("head.")]
    kept = {name: value for name, value in own.items() if name.startswith("head.")}
    classes = adapted["head.weight"].shape[0] if "head.weight" in adapted else 0
    if not kept:
        note = [f"dropped the head of {classes} classes: the model has none"] if given else []
    elif not given:
        note = [LoudNote(f"no head in the weights: the model keeps its own of {num_classes} classes")]
    elif classes != num_classes:
        note = [LoudNote(f"the head is for {classes} classes: the model keeps its own of {num_classes}")]
    else:
        return []
    for name in given:
        del adapted[name]
    # A head without values (on the meta device) cannot be kept: then load_state_dict reports it missing.
    adapted.update({name: value.clone() for name, value in kept.items() if not value.is_meta})
    return note


def _adapt_pos_embed(adapted: dict[str, Tensor], own: Mapping[str, Tensor], grid: tuple[int, int]) -> list[str]:
    table, target = adapted.get("pos_embed"), own.get("pos_embed")
    if table is None or target is None:
        return []
    side = square_side(table)
    if table.shape[1] == target.shape[1] and (side in (None, *grid) or not _is_unresized(table)):
        return []
    if side is None:
        raise CheckpointError(
            f"pos_embed has {table.shape[1] - 1} tokens, the model {grid[0]}x{grid[1]} = {target.shape[1] - 1}: a "
            "table that is not of a square grid cannot be resized, for its height and width are not in the weights"
        )
    adapted["pos_embed"] = resize_table(table, (side, side), grid)
    return [LoudNote(f"resized pos_embed from {side}x{side} to {grid[0]}x{grid[1]} tokens")]


def _is_unresized(table: Tensor) -> bool:
    """Whether this is the table that a model starts with, and so that of a square image unless trained on others."""
    return torch.allclose(table.float().cpu(), sinusoid_table(*table.shape[1:]), atol=1e-2)


def _adapt_in_chans(adapted: dict[str, Tensor], in_chans: int) -> list[str]:
    source = source_channels(adapted)
    if not source or source == in_chans:
        return []
    note = f"adapted the first layer from {source} to {in_chans} input channels"
    convolution = "tokens_to_token.soft_split0.weight"
    if convolution in adapted:
        adapted[convolution] = _repeat_channels(adapted[convolution].double(), in_chans).to(adapted[convolution].dtype)
        return [LoudNote(note)]

    layer = "tokens_to_token.attention1."
    projection = layer + ("kqv" if f"{layer}kqv.weight" in adapted else "attn.qkv")
    names = f"{layer}norm1.weight", f"{layer}norm1.bias", f"{projection}.weight"
    if any(name not in adapted for name in names):
        return []
    # W (gamma * n + beta) + b = (W diag(gamma)) n + (W beta + b), and the normalised n is the same in every channel
    # when the channels are: only the folded weight has to be adapted.
    gamma, beta, weight = (adapted[name].double() for name in names)
    shift = weight @ beta
    weight = (weight * gamma).unflatten(1, (-1, FIRST_KERNEL, FIRST_KERNEL))
    weight = _repeat_channels(weight, in_chans).flatten(1)
    values = dict(zip(names, (torch.ones_like(weight[0]), torch.zeros_like(weight[0]), weight), strict=True))

    bias_name = f"{projection}.bias"
    if bias_name in adapted:
        values[bias_name] = shift = adapted[bias_name].double() + shift
    if projection.endswith("attn.qkv"):
        # The token transformer scales its scores by the input width**-0.5, and the width changes.
        queries = slice(0, len(weight) // 3)
        weight[queries] *= (in_chans / source) ** 0.5
        shift[queries] *= (in_chans / source) ** 0.5
    if bias_name not in adapted:
        values[names[1]] = torch.linalg.pinv(weight, rtol=1e-2) @ shift
        note += f"; without {bias_name} the shift of its LayerNorm is kept only approximately"
    adapted.update({name: value.to(adapted[name].dtype) for name, value in values.items()})
    return [LoudNote(note)]


def _repeat_channels(weight: Tensor, in_chans: int) -> Tensor:
    """timm's rule for (out, channels, k, k): repeat the channels cyclically and rescale; for one channel, their sum."""
    channels = weight.shape[1]
    if in_chans == 1:
        return weight.sum(1, keepdim=True)
    return weight[:, torch.arange(in_chans, device=weight.device) % channels] * (channels / in_chans)
