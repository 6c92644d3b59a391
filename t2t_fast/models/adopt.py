"""``optimize``: replace a T2T-ViT built by other code with one of ours that shares its parameters."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ..layers.tokens_to_token import _FIRST, _LATER
from .adapt import unwrap_model
from .architecture import describe_mismatch, read_design, require_t2t_vit, source_channels, square_side
from .layouts import CheckpointError, official_name, some, to_official
from .t2t_vit import T2TViT
from .t2t_vit_dense import T2TViTDense

_logger = logging.getLogger("t2t_fast")

_WINDOWS = {"soft_split0": _FIRST, "soft_split1": _LATER, "soft_split2": _LATER, "project": _LATER}
_ACTIVATION = re.compile(r".+\.(act|mlp\.1|ffn\.layers\.0\.1)")
_TOKEN_LAYERS = ("tokens_to_token.attention1", "tokens_to_token.attention2")


def optimize(model: nn.Module, backend: str = "auto") -> T2TViT:
    """Make this package's model from a T2T-ViT built by the official code or by mmpretrain.

    The model is recognised by its structure, so neither project needs to be installed. The result *shares* the
    parameters (training one trains the other) and has the same training mode, device, dtype and dropout rates.
    ``state_dict()`` of the result has the official names.

    Two cases log a warning. mmpretrain from 1.0.0rc7 on divides the attention scores by the scale; the result
    multiplies, as the original does and the released checkpoints were trained. Factories of the official code that were
    asked for pretrained weights use ``embed_dim**-0.5`` as the scale; the result keeps it.

    Args:
        model: An official ``T2T_ViT`` (any variant), an mmpretrain ``T2T_ViT`` backbone or a classifier around it,
            bare or inside DataParallel or ``torch.compile``; the result is bare. A model of this package is returned
            unchanged.
        backend: As for :class:`T2TViT`.

    Returns:
        The model.

    Raises:
        TypeError: ``model`` is not such a T2T-ViT; the message says what was expected and what differs.
    """
    expected = "model must be a T2T-ViT of the official code (class T2T_ViT) or of mmpretrain (backbone T2T_ViT)"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{expected}, got {model!r:.80} of type {type(model).__name__}, which is no torch.nn.Module")
    model = unwrap_model(model)
    if isinstance(model, T2TViT):
        return model
    expected += f", got {type(model).__name__}, which "
    state_dict = model.state_dict(keep_vars=True)
    try:
        tensors, layout = to_official({k: v for k, v in state_dict.items() if isinstance(v, Tensor)})
        require_t2t_vit(tensors, list(state_dict))
    except CheckpointError as error:
        raise TypeError(expected + str(error)) from error
    modules = {official_name(f"{name}.", layout)[:-1]: module for name, module in model.named_modules()}
    if reasons := list(_why_not(tensors, modules, layout)):
        raise TypeError(f"{expected}looks like one, but {'; '.join(reasons)}")
    try:
        ours = _rebuild(tensors, modules, layout, backend)
    except ValueError as error:
        raise TypeError(expected + str(error)) from error
    mismatch = describe_mismatch(tensors, ours.state_dict())
    if mismatch:
        raise TypeError(f"{expected}looks like one, but none that can be taken over: {mismatch}")
    _share(ours, tensors)
    _copy_settings(ours, modules)
    _copy_scales(ours, modules)
    _copy_training(ours, modules, model.training)
    return ours


def _why_not(tensors: dict[str, Tensor], modules: dict[str, nn.Module], layout: str) -> Iterator[str]:
    """Reasons, invisible in the weights, why our model would compute something else."""
    if layout not in ("official", "mmpretrain"):
        yield f"its parameters have the layout of {layout}"
    heads = {getattr(module, "num_heads", None) for module in _block_attentions(modules)}
    if len(heads) != 1 or not all(isinstance(number, int) for number in heads):
        yield f"its blocks must have one number of attention heads (num_heads), got {some([*map(str, heads)])}"
    for name in _TOKEN_LAYERS:
        if getattr(modules.get(f"{name}.attn"), "num_heads", 1) != 1:
            yield f"{name} has more than one head"
        dropouts = [part for part in ("attn.attn_drop", "attn.proj_drop") if _rate(modules, f"{name}.{part}")]
        if dropouts:
            yield f"{name} has a dropout ({some(dropouts)})"
    if "pos_embed" not in tensors or square_side(tensors["pos_embed"]) is None:
        yield "it has no position table (pos_embed) of a square grid"
    if any(getattr(module, "with_cls_token", True) is False for module in modules.values()):
        yield "it drops the cls token (with_cls_token=False)"
    for name, window in _WINDOWS.items():
        split: Any = modules.get(f"tokens_to_token.{name}")
        if hasattr(split, "kernel_size") and _window(split) != window:
            yield f"tokens_to_token.{name} has (kernel size, stride, padding) {_window(split)} instead of {window}"
    for name, module in modules.items():
        if name.endswith((".attn_drop", ".proj_drop")) and type(module) not in (nn.Dropout, nn.Identity):
            yield f"{name} must be a Dropout, got {module!r}"
        exact = isinstance(module, nn.GELU) and module.approximate == "none"
        if _ACTIVATION.fullmatch(name) and not exact:
            yield f"{name} must be an exact GELU, got {module!r}"


def _block_attentions(modules: dict[str, nn.Module]) -> Iterator[Any]:
    for name, module in modules.items():
        if name.startswith("blocks.") and name.endswith(".norm1"):
            yield modules.get(name.removesuffix("norm1") + "attn", module)


def _window(split: Any) -> tuple[Any, ...]:
    """Kernel size, stride and padding of an Unfold or convolution, and its dilation if that is not 1."""
    pairs = [getattr(split, name) for name in ("kernel_size", "stride", "padding", "dilation")]
    values = [value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value for value in pairs]
    return tuple(values[:3] if values[3] == 1 else values)


def _rebuild(tensors: dict[str, Tensor], modules: dict[str, nn.Module], layout: str, backend: str) -> T2TViT:
    """A model of the same design, on the meta device."""
    design = read_design(tensors)
    width, hidden = tensors["blocks.0.mlp.fc2.weight"].shape
    if int(width * design["mlp_ratio"]) < hidden:  # where the quotient was rounded down
        design["mlp_ratio"] = math.nextafter(design["mlp_ratio"], math.inf)
    averaged = any(getattr(module, "out_type", None) == "avg_featmap" for module in modules.values())
    model_class = T2TViTDense if design["block_type"] == "dense" else T2TViT
    with torch.device("meta"):
        return model_class(
            **design,
            num_heads=next(_block_attentions(modules)).num_heads,
            img_size=(square_side(tensors["pos_embed"]) or 1) * 16,
            in_chans=source_channels(tensors) or 3,
            num_classes=tensors["head.weight"].shape[0] if "head.weight" in tensors else 0,
            token_dim=tensors["tokens_to_token.project.weight"][0].numel() // 9,
            qkv_bias=any(f"blocks.0.attn.{part}.bias" in tensors for part in ("qkv", "q")),
            global_pool="avg" if averaged else "token",
            dynamic_img_size=layout == "mmpretrain",  # its backbone resizes the position table per call
            backend=backend,
        )


def _share(ours: T2TViT, tensors: dict[str, Tensor]) -> None:
    for name in ours.state_dict():
        tensor = tensors[name]
        parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        setattr(ours.get_submodule(parent), leaf, parameter)


def _copy_settings(ours: T2TViT, modules: dict[str, nn.Module]) -> None:
    """Epsilons and dropout rates."""
    module: Any
    for name, module in ours.named_modules():
        theirs: Any = modules.get(name)
        if isinstance(module, nn.LayerNorm):
            module.eps = getattr(theirs, "eps", module.eps)
        elif isinstance(module, nn.Dropout):
            module.p = getattr(theirs, "p", module.p)
        elif hasattr(module, "epsilon"):
            module.epsilon = getattr(theirs, "epsilon", module.epsilon)
    ours.pos_drop.p = _rate(modules, "pos_drop", "drop_after_pos")
    for name, layer in [*_blocks(ours), *((name, ours.get_submodule(name)) for name in _token_transformers(ours))]:
        drop = _rate(modules, f"{name}.mlp.drop", f"{name}.ffn.layers.2", f"{name}.mlp.drop1")
        for module in layer.mlp.modules():
            if isinstance(module, nn.Dropout):
                module.p = drop
    for name, block in _blocks(ours):
        block.attn.attn_drop.p = _rate(modules, f"{name}.attn.attn_drop")
        block.attn.proj_drop.p = _rate(modules, f"{name}.attn.proj_drop")
        rate = _rate(modules, f"{name}.drop_path", f"{name}.attn.out_drop")
        block.drop_path = DropPath(rate) if rate else nn.Identity()


def _copy_scales(ours: T2TViT, modules: dict[str, nn.Module]) -> None:
    holders = [(f"{name}.attn", block.attn) for name, block in _blocks(ours)]
    token_layers: list[tuple[str, Any]] = [
        (f"{name}.attn", ours.get_submodule(f"{name}.attn")) for name in _token_transformers(ours)
    ]
    for name, holder in [*holders, *token_layers]:
        scale = getattr(modules[name], "scale", None)
        if scale is not None:
            holder.scale = float(scale)
    if any(hasattr(modules[name], "scaled_dot_product_attention") for name, _ in holders):
        _logger.warning(
            "this mmpretrain divides attention scores by the scale (since 1.0.0rc7); the optimized model multiplies "
            "by head_dim**-0.5, with which the released checkpoints were trained: its logits differ, and are right"
        )
    for name, attn in holders:
        default = attn.head_dim**-0.5
        if abs(attn.scale - default) > 1e-6 * default:
            _logger.warning(
                "the model's qk_scale is %.6g (%s), kept as it is; the released checkpoints were trained with "
                "head_dim**-0.5 = %.6g",
                attn.scale,
                name,
                default,
            )
            return


def _copy_training(ours: T2TViT, modules: dict[str, nn.Module], training: bool) -> None:
    """Copy each module's training mode, as parts may be frozen. A module without a counterpart takes its parent's."""
    for name, module in ours.named_modules():
        while name and name not in modules:
            name = name.rpartition(".")[0]
        module.training = modules[name].training if name else training


def _blocks(ours: T2TViT) -> Iterator[tuple[str, Any]]:
    """The blocks and their names, without the transitions of the dense design."""
    for i, block in enumerate(ours.blocks):
        if hasattr(block, "attn"):
            yield f"blocks.{i}", block


def _token_transformers(ours: T2TViT) -> list[str]:
    return list(_TOKEN_LAYERS) if ours.tokens_to_token.tokens_type == "transformer" else []


def _rate(modules: dict[str, nn.Module], *names: str) -> float:
    """The rate of the first dropout or drop path that exists among ``names``; newer mmpretrain has plain numbers."""
    for name in names:
        parent, _, leaf = name.rpartition(".")
        found = getattr(modules.get(parent), leaf, None) if parent else modules.get(name)
        found = getattr(found, "p", getattr(found, "drop_prob", found))
        if isinstance(found, float | int):
            return float(found)
    return 0.0
