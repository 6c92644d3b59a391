"""Recognise the model of a state dict by the names and shapes of its entries."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import FLOAT_DTYPES
from .layouts import CheckpointError, detect_layout, some
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
_BLOCK_NORM = re.compile(r"blocks\.(\d{1,6})\.norm1\.weight")
_PARAMETER = re.compile(
    r"(?:(?:tokens_to_token|blocks)\.(?:\w+\.)*)?(?<![^.])"
    r"(norm[12]?|qkv|[qkv]|kqv|proj|project|fc[12]|soft_split[01]|cheap_operation[23qkv]|dense_linear|linear|[02]"
    r"|attention[12])\.(weight|bias|w)"
)
_PIXELS_PER_TOKEN = 16  # along one side: 4 * 2 * 2
FIRST_KERNEL = 7
_MAX_EXPANDED_BYTES = 2**30  # for expanded tensors, which claim more values than the file stores; a model has 0.26e9


def infer_architecture(
    state_dict: Mapping[str, Tensor], grid_size: tuple[int, int] | None = None
) -> tuple[str, dict[str, Any]]:
    """Recognise the model that a state dict belongs to.

    Weights do not show the number of heads. Of models that differ in nothing else, the first in
    :data:`t2t_fast.models.variants.VARIANTS` is taken (``t2t_vit_14``, never ``t2t_vit_14_resnext``);
    :func:`lookalikes` names the others.

    Args:
        state_dict: Official names to tensors (only shapes are read).
        grid_size: Height and width of the position table's grid, in tokens; None means a square grid.

    Returns:
        The name of the model, and its keyword arguments ``num_classes`` (0 without a head), ``in_chans``,
        ``token_dim``, ``qkv_bias`` and ``img_size``; the last only if the grid is given or can be a square.

    Raises:
        CheckpointError: Not a T2T-ViT, or none with a name; the message names the closest model and the differences.
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
    if grid_size is not None and grid_size[0] != grid_size[1]:
        kwargs["img_size"] = (grid_size[0] * _PIXELS_PER_TOKEN, grid_size[1] * _PIXELS_PER_TOKEN)
    elif side is not None:
        kwargs["img_size"] = side * _PIXELS_PER_TOKEN
    return name, kwargs


def lookalikes(name: str) -> tuple[str, ...]:
    """The other models whose parameters have the same names and shapes as those of model ``name``."""
    return tuple(other for other in VARIANTS if other != name and _variant_design(other) == _variant_design(name))


def require_t2t_vit(
    state_dict: Mapping[str, Tensor], found: Sequence[str] | None = None, remarks: Sequence[str] = ()
) -> None:
    """Raise :class:`CheckpointError` unless ``state_dict`` (official names) has what every T2T-ViT has.

    Args:
        state_dict: Official names to tensors.
        found: The names before translation, for the message.
        remarks: Further text for the message.
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
        + "".join(f"; {remark}" for remark in remarks)
    )


def check_entries(state_dict: Mapping[str, Tensor]) -> None:
    """Raise :class:`CheckpointError` unless every entry with the name of a T2T-ViT's weight can be that weight.

    Checks types, dtypes and numbers of dimensions, and allocates nothing.

    Args:
        state_dict: Official names to tensors. Entries with other names are not checked, nor is the head.
    """
    claimed = {name: value.numel() * value.element_size() for name, value in state_dict.items() if _is_expanded(value)}
    if sum(claimed.values()) > _MAX_EXPANDED_BYTES:
        names = some([*claimed])
        raise CheckpointError(f"claims {sum(claimed.values())} bytes that are not in the file: {names} are expanded")
    for name, value in state_dict.items():
        ndims = _expected_ndim(name, value.ndim)
        if not ndims:
            continue
        if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided or value.is_quantized:
            kind = type(value).__name__ if type(value) not in (Tensor, nn.Parameter) else value.layout
            kind = "quantised" if value.is_quantized else kind
            raise CheckpointError(f"{name} is {kind}, not a plain dense tensor")
        if value.is_meta:
            raise CheckpointError(f"{name} has no values: it is on the meta device")
        if value.dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"{name} has dtype {value.dtype}; accepted: {', '.join(map(str, FLOAT_DTYPES))}")
        if value.ndim not in ndims or 0 in value.shape:
            wanted = " or ".join(map(str, ndims))
            raise CheckpointError(f"{name} must have {wanted} dimensions, none empty, got shape {tuple(value.shape)}")
        if name == "cls_token" and value.shape[:2] != (1, 1):
            raise CheckpointError(f"cls_token must have shape (1, 1, width), got {tuple(value.shape)}")
        if name == "pos_embed" and value.shape[-1:] != state_dict.get("cls_token", value).shape[-1:]:
            raise CheckpointError(f"pos_embed must be as wide as cls_token, got shape {tuple(value.shape)}")
        if name == "pos_embed" and (value.shape[0] != 1 or value.shape[1] < 2):
            raise CheckpointError(f"pos_embed must have shape (1, 1 + height * width, width), got {tuple(value.shape)}")


def _is_expanded(value: Tensor) -> bool:
    """Whether the tensor has more values than its storage, as one row expanded to many has."""
    if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided or value.is_meta:
        return False
    return value.numel() * value.element_size() > value.untyped_storage().nbytes()


def _expected_ndim(name: str, ndim: int) -> tuple[int, ...]:
    """The numbers of dimensions that a T2T-ViT's entry of this name may have; empty for a foreign name."""
    if name in ("cls_token", "pos_embed"):
        return (3,)
    if (name, ndim) in (("head.weight", 2), ("head.bias", 1)):  # of a Linear; other heads are not checked
        return (ndim,)
    match = _PARAMETER.fullmatch(name)
    if not match:
        return ()
    module, leaf = match[1], match[2]
    if leaf == "bias" or module.startswith("norm"):
        return (1,)
    if module.startswith("soft_split"):
        return (4,)
    if module.startswith("cheap_operation"):
        return (3,)
    return (2, 4) if module == "project" else (2,)


def describe_mismatch(given: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """How the entries of a file differ from the model's, in one line; empty if they do not."""
    parts = {
        "missing": [name for name in own if name not in given],
        "unexpected": [name for name in given if name not in own],
        "of another shape": [
            f"{name} {_shape(given[name])} for {_shape(own[name])}"
            for name in own
            if name in given and _shape(given[name]) != _shape(own[name])
        ],
    }
    text = "; ".join(f"{len(names)} {what}: {some(names)}" for what, names in parts.items() if names)
    if not text:
        return ""
    found, wanted = (_closest_variant(read_design(weights))[0] for weights in (given, own))
    return f"the weights (closest model {found}) do not fit the model (closest {wanted}): {text}"


def _shape(value: Any) -> tuple[int, ...] | str:
    """The shape of a tensor; for anything else, as quantised modules have, the name of its type."""
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def source_channels(state_dict: Mapping[str, Tensor]) -> int | None:
    """The number of input channels that the weights were made for, None if it cannot be read."""
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
    """The constructor's arguments that names and shapes show; others are left out."""
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
        stages, previous = [0], -1
        for i in sorted(blocks):
            if i > previous + 1:  # a transition stands between
                stages.append(0)
            stages[-1] += 1
            previous = i
        design["block_config"] = tuple(stages)
    return design


def _variant_design(name: str) -> dict[str, Any]:
    return {key: value for key, value in VARIANTS[name].kwargs.items() if key != "num_heads"}


def _closest_variant(design: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The named model that differs least from a (possibly partial) design, and the differences as texts."""

    def distance(name: str) -> tuple[int, float]:
        wanted = _variant_design(name)
        relative = [abs(math.log(design[key] / wanted[key])) for key in ("embed_dim", "depth") if key in design]
        return sum(wanted.get(key) != value for key, value in design.items()), sum(relative)

    name = min(VARIANTS, key=distance)
    wanted = _variant_design(name)
    differing = [key for key, value in design.items() if wanted.get(key) != value]
    return name, [f"{key} is {design[key]!r} instead of {wanted.get(key)!r}" for key in differing]
