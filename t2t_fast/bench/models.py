"""The models that the benchmarks compare: names, sets of names, constructors and random weights."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import t2t_fast
from t2t_fast.macs import Macs, count_macs
from t2t_fast.usage import UsageError

# The ViT-S/16 of the paper: timm's then had 768 channels in 8 layers; today's has the size of DeiT-S.
PAPER_VIT_SMALL = "vit_small_patch16_224_of_the_paper"
_PAPER_VIT_SMALL: dict[str, Any] = {
    "patch_size": 16,
    "embed_dim": 768,
    "depth": 8,
    "num_heads": 8,
    "mlp_ratio": 3.0,
    "qkv_bias": False,
}
SETS = {
    "zoo": tuple(t2t_fast.list_models()),
    "paper": (
        *(f"t2t_vit_{depth}" for depth in (7, 12, 14, 19, 24)),
        *(f"t2t_vit_t_{depth}" for depth in (14, 19, 24)),
        PAPER_VIT_SMALL,
        "vit_small_patch16_224",
        "vit_base_patch16_224",
        "deit_tiny_patch16_224",
        "deit_small_patch16_224",
        "deit_base_patch16_224",
        "resnet50",
        "resnet101",
        "resnet152",
        "mobilenetv2_100",
        "mobilenetv2_140",
        "mobilenetv3_large_100",
    ),
}


def resolve_names(names: Sequence[str]) -> list[str]:
    """The models that ``names`` (of models or sets) stand for, each once.

    Raises:
        UsageError: A name is unknown here and to timm.
    """
    resolved: dict[str, None] = {}
    for name in names:
        if name not in SETS and name != PAPER_VIT_SMALL and not timm.is_model(name):
            near = difflib.get_close_matches(name, timm.list_models(), n=3)  # ours are registered there
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            ours = ", ".join(t2t_fast.list_models())
            raise UsageError(
                f"--models: {name!r} is unknown; accepted: {', '.join(SETS)}, {ours} and timm's names{hint}"
            )
        resolved.update(dict.fromkeys(SETS.get(name, (name,))))
    return list(resolved)


def is_ours(name: str) -> bool:
    """Whether the model is a T2T-ViT of this package."""
    return name in t2t_fast.list_models()


def create(name: str, img_size: int | None = None, **kwargs: Any) -> nn.Module:
    """The model in evaluation mode, for images of ``img_size`` or by default of its own size.

    Raises:
        UsageError: It does not take images of that size.
    """
    size: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    try:
        if name == PAPER_VIT_SMALL:
            return VisionTransformer(**size, **_PAPER_VIT_SMALL).eval()
        try:
            return timm.create_model(name, **size, **kwargs).eval()
        except TypeError:  # most convolutional networks take any size and have no such argument
            return timm.create_model(name, **kwargs).eval()
    except (AssertionError, ValueError) as error:  # how timm and this package refuse a size
        if img_size is None:
            raise
        raise UsageError(f"--img-size: got {img_size}, which {name} does not take: {error}") from error


def count(name: str, img_size: int) -> Macs:
    """Parameters, multiply-accumulates and activations of one image.

    Raises:
        UsageError: The model does not take images of that size.
    """
    try:
        with torch.device("meta"):
            return count_macs(create(name, img_size), img_size)
    except (AssertionError, ValueError) as error:
        raise UsageError(f"--img-size: got {img_size}, which {name} does not take: {error}") from error


def random_weights(name: str, img_size: int, seed: int) -> dict[str, Tensor]:
    """Random weights of one of this package's models, with which every parameter affects the logits."""
    torch.manual_seed(seed)
    model = create(name, img_size)
    _spread(model)
    return model.state_dict()


def _spread(model: nn.Module) -> None:
    """Draw every bias and norm, and weights that preserve the variance; keys and queries shorter.

    With the initial weights, logits depend little on the image and not on biases; with long keys and queries the
    Performer's features almost vanish. Both would hide errors.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            gain = 0.5 if name.endswith("kqv") else 1.0
            nn.init.normal_(module.weight, std=gain * module.in_features**-0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
