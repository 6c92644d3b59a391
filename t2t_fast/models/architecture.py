"""Which model a state dict belongs to, read off the names and shapes of its entries."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .layouts import CheckpointError, detect_layout
from .variants import VARIANTS

_ESSENTIAL = ("cls_token", "tokens_to_token.project.weight", "blocks.0.norm1.weight", "blocks.0.mlp.fc2.weight")
_TOKEN_LAYERS = {
    "performer": "tokens_to_token.attention1.kqv.weight",
    "transformer": "tokens_to_token.attention1.attn.qkv.weight",
    "convolution": "tokens_to_token.soft_split0.weight",
}
_BLOCKS = {
    "dense": "blocks.0.dense_linear.weight",
    "se": "blocks.0.attn.se_layer.fc.0.weight",
    "se_mlp": "blocks.0.mlp.se_layer.fc.0.weight",
    "ghost": "blocks.0.mlp.cheap_operation2.weight",
    "standard": "blocks.0.mlp.fc2.weight",
}
_BLOCK_NORM = re.compile(r"blocks\.(\d+)\.norm1\.weight")
_PIXELS_PER_TOKEN = 16  # along one side: 4 * 2 * 2
FIRST_KERNEL = 7


def infer_architecture(state_dict: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Recognise the model that a state dict belongs to.

    The number of heads leaves no trace in the weights, so models that differ in nothing else cannot be told apart:
    the first of :data:`t2t_fast.models.variants.VARIANTS` is taken (``t2t_vit_14``, never ``t2t_vit_14_resnext``), and
    :func:`lookalikes` names the others.

    Args:
        state_dict: Official names to tensors (only shapes are read).

    Returns:
        The name of the model, and its keyword arguments ``num_classes`` (0 without a head), ``in_chans``,
        ``token_dim``, ``qkv_bias`` and ``img_size``; the last only if the position table is that of a square image.

    Raises:
        CheckpointError: This is no T2T-ViT, or no named one; the message tells the closest and the differences.
    """
    require_t2t_vit(state_dict)
    design = read_design(state_dict)
    name, differences = _closest_variant(design)
    if differences:
        raise CheckpointError(
            f"no named model has {', '.join(f'{key}={value!r}' for key, value in design.items())}; "
            f"the closest is {name}, but {', '.join(differences)}"
        )
    project = state_dict["tokens_to_token.project.weight"]  # (out, token_dim * 9), or (out, token_dim, 3, 3)
    kwargs: dict[str, Any] = {
        "num_classes": state_dict["head.weight"].shape[0] if "head.weight" in state_dict else 0,
        "in_chans": source_channels(state_dict),
        "token_dim": project[0].numel() // 9,
        "qkv_bias": any(f"blocks.0.attn.{part}.bias" in state_dict for part in ("qkv", "q")),
    }
    side = square_side(state_dict["pos_embed"]) if "pos_embed" in state_dict else None
    if side is not None:
        kwargs["img_size"] = side * _PIXELS_PER_TOKEN
    return name, kwargs


def lookalikes(name: str) -> tuple[str, ...]:
    """The other models whose parameters have the very names and shapes of those of model ``name``."""
    return tuple(other for other in VARIANTS if other != name and _variant_design(other) == _variant_design(name))


def require_t2t_vit(state_dict: Mapping[str, Tensor], found: Sequence[str] | None = None) -> None:
    """Raise :class:`CheckpointError` unless ``state_dict`` (official names) has what every T2T-ViT has.

    Args:
        state_dict: Official names to tensors.
        found: The names before translation, for the message.
    """
    missing = [name for name in _ESSENTIAL if name not in state_dict]
    if not any(name in state_dict for name in _TOKEN_LAYERS.values()):
        missing.append(" or ".join(_TOKEN_LAYERS.values()))
    if not missing:
        return
    found = list(state_dict if found is None else found)
    design = read_design(state_dict)
    total = len(_ESSENTIAL) + 1
    raise CheckpointError(
        f"holds no T2T-ViT: found {some(found)}; missing {', '.join(missing)}; closest layout {detect_layout(found)} "
        f"({total - len(missing)} of {total} essential names), "
        + (f"closest model {_closest_variant(design)[0]}" if design else "no model comes close")
    )


def describe_mismatch(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """One line on how the entries of a file differ from a model's own, empty if they do not."""
    parts = {
        "missing": [name for name in own if name not in given],
        "unexpected": [name for name in given if name not in own],
        "of another shape": [
            f"{name} {tuple(given[name].shape)} for {tuple(own[name].shape)}"
            for name in own
            if name in given and given[name].shape != own[name].shape
        ],
    }
    text = "; ".join(f"{len(names)} {what}: {some(names)}" for what, names in parts.items() if names)
    if not text:
        return ""
    found, wanted = (_closest_variant(read_design(weights))[0] for weights in (given, own))
    return f"the weights (closest model {found}) do not fit the model (closest {wanted}): {text}"


def some(names: Sequence[str], count: int = 4) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more if names else "nothing"


def source_channels(state_dict: Mapping[str, Tensor]) -> int | None:
    """The input channels that weights were made for, None where it cannot be read."""
    if "tokens_to_token.soft_split0.weight" in state_dict:
        return state_dict["tokens_to_token.soft_split0.weight"].shape[1]
    if "tokens_to_token.attention1.norm1.weight" in state_dict:
        return state_dict["tokens_to_token.attention1.norm1.weight"].numel() // FIRST_KERNEL**2
    return None


def square_side(table: Tensor) -> int | None:
    """The side of the square grid of a position table (1, 1 + side**2, dim), None if it is not square."""
    tokens = table.shape[1] - 1
    side = math.isqrt(tokens)
    return side if side * side == tokens else None


def read_design(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes tell of the constructor's arguments; facts that cannot be read are left out."""
    design: dict[str, Any] = {}
    for key, marks in (("tokens_type", _TOKEN_LAYERS), ("block_type", _BLOCKS)):
        value = next((value for value, mark in marks.items() if mark in state_dict), None)
        if value:
            design[key] = value
    if "cls_token" in state_dict:
        design["embed_dim"] = state_dict["cls_token"].shape[-1]
    blocks = {int(match[1]) for match in map(_BLOCK_NORM.fullmatch, state_dict) if match}
    if blocks:
        design["depth"] = len(blocks)
    if "blocks.0.mlp.fc2.weight" in state_dict:
        width, hidden = state_dict["blocks.0.mlp.fc2.weight"].shape
        design["mlp_ratio"] = hidden / width
    if design.get("block_type") == "dense" and blocks:
        design["growth_rate"] = state_dict[_BLOCKS["dense"]].shape[0]
        stages = [0]
        for i in range(max(blocks) + 1):
            if i in blocks:
                stages[-1] += 1
            else:  # a transition
                stages.append(0)
        design["block_config"] = tuple(stages)
    return design


def _variant_design(name: str) -> dict[str, Any]:
    return {key: value for key, value in VARIANTS[name].kwargs.items() if key != "num_heads"}


def _closest_variant(design: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The named model with the fewest differences to a (possibly partial) design, and the differences in words."""

    def distance(name: str) -> tuple[int, float]:
        wanted = _variant_design(name)
        relative = [abs(math.log(design[key] / wanted[key])) for key in ("embed_dim", "depth") if key in design]
        return sum(wanted.get(key) != value for key, value in design.items()), sum(relative)

    name = min(VARIANTS, key=distance)
    wanted = _variant_design(name)
    differing = [key for key, value in design.items() if wanted.get(key) != value]
    return name, [f"{key} is {design[key]!r} instead of {wanted.get(key)!r}" for key in differing]
