"""Fit weights to a T2T-ViT with another head, image size or number of input channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import FIRST_KERNEL, source_channels, square_side
from .layouts import CheckpointError, some, unwrapped
from .pos_embed import resize_table


class LoudNote(str):
    """A note about a change to the weights that a user should see: logged as a warning."""


def t2t_vit_inside(model: Any) -> Any:
    """``model``, or the model inside DataParallel and ``torch.compile``, if that is a T2T-ViT of ours; else None."""
    model = unwrap_model(model)
    return model if hasattr(model, "tokens_to_token") and hasattr(model, "grid_size") else None


def unwrap_model(model: Any) -> Any:
    """The model inside DataParallel and ``torch.compile``."""
    while hasattr(model, "_orig_mod") or isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def adapt_state_dict(
    state_dict: Mapping[str, Tensor], model: nn.Module, grid_size: tuple[int, int] | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """Fit weights to a T2T-ViT with another head, image size or number of input channels.

    * Head: where the weights have none, or one of other names or shapes, the model keeps its own. A model without a
      head drops that of the weights.
    * Position table of another grid: resized bicubically to ``model.grid_size``; the class token's row stays. Without a
      fitting ``grid_size``, a table of the model's shape is taken unchanged, and any other one as of a square grid.
    * Input channels: timm's rule, repeat and rescale. The first LayerNorm's affine weights are folded into the
      projection first, so with one channel the model computes what the original does for the repeated grey image.

    Other entries pass unchanged; ``load_state_dict`` reports those that do not fit.

    Args:
        state_dict: Official names to tensors; not modified.
        model: The model to fit (its ``state_dict()``, ``grid_size``, ``tokens_to_token.in_chans``).
        grid_size: Height and width of the table's grid, in tokens; ignored if it does not fit the table.

    Returns:
        The adapted state dict and one note per change; a :class:`LoudNote` if the model then computes something else.

    Raises:
        CheckpointError: A position table of a non-square grid would have to be resized, and ``grid_size`` is not given.
    """
    adapted = dict(state_dict)
    net: Any = model
    own = {unwrapped(name): value for name, value in model.state_dict().items()}
    notes = [
        *_adapt_head(adapted, own),
        *_adapt_pos_embed(adapted, own, net.grid_size, grid_size),
        *_adapt_in_chans(adapted, net.tokens_to_token.in_chans),
    ]
    return adapted, notes


def _adapt_head(adapted: dict[str, Tensor], own: Mapping[str, Any]) -> list[str]:
    given = {name: value for name, value in adapted.items() if name.startswith("head.")}
    kept = {name: value for name, value in own.items() if name.startswith("head.")}  # quantised: not only tensors
    if given.keys() == kept.keys() and all(_shape(given[name]) == _shape(kept[name]) for name in given):
        return []
    if not kept:
        note = f"dropped {_describe_head(given)}: the model has none"
        if not _of_classes(given):  # no model name or num_classes makes such a head
            note = LoudNote(f"{note}; give the model such a head, and load it with load_checkpoint")
    elif not given:
        note = LoudNote(f"no head in the weights: the model keeps its own{_of_classes(kept)}")
    elif _of_classes(given) and _of_classes(kept):
        count = kept["head.weight"].shape[0]
        note = LoudNote(f"the head is{_of_classes(given, 'for')}: the model keeps its own of {count}")
    else:
        note = LoudNote(f"{_describe_head(given)} does not fit: the model keeps its own, {_describe_head(kept)}")
    for name in given:
        del adapted[name]
    # A head on the meta device has no values to keep; load_state_dict then reports it missing.
    for name, value in kept.items():
        if not isinstance(value, Tensor):
            adapted[name] = value
        elif not value.is_meta:
            adapted[name] = value.clone()
    return [note]


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _of_classes(head: Mapping[str, Any], preposition: str = "of") -> str:
    """`` of N classes`` for a head that is one Linear; an empty text for any other head."""
    if head.keys() <= {"head.weight", "head.bias"} and "head.weight" in head:
        return f" {preposition} {head['head.weight'].shape[0]} classes"
    return ""


def _describe_head(head: Mapping[str, Any]) -> str:
    shapes = [f"{name} {_shape(value) or type(value).__name__}" for name, value in head.items()]
    return "the head" + (_of_classes(head) or f" of {some(shapes)}")


def _adapt_pos_embed(
    adapted: dict[str, Tensor], own: Mapping[str, Any], grid: tuple[int, int], recorded: tuple[int, int] | None
) -> list[str]:
    if "pos_embed" not in adapted or "pos_embed" not in own:
        return []
    adapted["pos_embed"], notes = fit_table(adapted["pos_embed"], grid, recorded)
    return notes


def fit_table(table: Tensor, grid: tuple[int, int], recorded: tuple[int, int] | None) -> tuple[Tensor, list[str]]:
    """A position table (1, 1 + h*w, dim) for a model of ``grid``, and notes; see :func:`adapt_state_dict`."""
    tokens, side = table.shape[1] - 1, square_side(table)
    if recorded is not None and recorded[0] * recorded[1] == tokens:
        source = recorded
    elif tokens == grid[0] * grid[1]:
        if not side or grid == (side, side):
            return table, []
        note = f"took pos_embed as one of {grid[0]}x{grid[1]} tokens, which the file does not tell; if it is one of"
        return table, [LoudNote(f"{note} {side}x{side}, pass grid_size=({side}, {side}) to load_checkpoint")]
    elif side is not None:
        source = (side, side)
    else:
        raise CheckpointError(
            f"pos_embed has {tokens} tokens, the model {grid[0]}x{grid[1]} = {grid[0] * grid[1]}: a table that is not "
            "of a square grid cannot be resized unless grid_size tells its height and width: the file does not"
        )
    if source == grid:
        return table, []
    note = f"resized pos_embed from {source[0]}x{source[1]} to {grid[0]}x{grid[1]} tokens"
    return resize_table(table, source, grid), [LoudNote(note)]


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
    if any(name not in adapted for name in names) or adapted[names[2]].shape[1] != source * FIRST_KERNEL**2:
        return []
    if any(adapted[name].shape != adapted[names[2]].shape[1:] for name in names[:2]):
        return []
    # W (gamma * n + beta) + b = (W diag(gamma)) n + (W beta + b). Equal channels have equal normalised values n, so
    # adapting the folded weight W diag(gamma) is enough.
    gamma, beta, weight = (adapted[name].double() for name in names)
    shift = weight @ beta
    weight = (weight * gamma).unflatten(1, (-1, FIRST_KERNEL, FIRST_KERNEL))
    weight = _repeat_channels(weight, in_chans).flatten(1)
    values = dict(zip(names, (torch.ones_like(weight[0]), torch.zeros_like(weight[0]), weight), strict=True))

    bias_name = f"{projection}.bias"
    if bias_name in adapted:
        values[bias_name] = shift = adapted[bias_name].double() + shift
    if projection.endswith("attn.qkv"):
        # The token transformer scales its scores by (input width)**-0.5, and the input width changes.
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
