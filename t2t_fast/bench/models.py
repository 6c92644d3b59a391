"""The models that the benchmarks compare: names, sets of names, and how each is made with random weights."""

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

# The ViT-S/16 that the paper compares with: timm's at that time, 768 channels in 8 layers; today's has DeiT-S's size.
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
    """The models that ``names``, models or sets of them, stand for, each once.

    Raises:
        UsageError: One is known neither here nor to timm.
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
    """The model in evaluation mode; without ``img_size`` it has its own.

    Raises:
        UsageError: It does not take images of that size.
    """
    size: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    try:
        if name == PAPER_VIT_SMALL:
            return VisionTransformer(**size, **_PAPER_VIT_SMALL).eval()
        try:
            return timm.create_model(name, **size, **kwargs).eval()
        except TypeError:  # most convolutional networks take any size, and no such argument
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
    """Weights of one of this package's models, drawn so that every parameter moves the logits."""
    torch.manual_seed(seed)
    model = create(name, img_size)
    _spread(model)
    return model.state_dict()


def _spread(model: nn.Module) -> None:
    """Random values in every bias and norm, and weights that keep the variance; shorter keys and queries.

    As initialised, the logits hardly depend on the image and not at all on the biases; and where keys and queries are
    long, the Performer's features all but vanish. Errors would hide.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            gain = 0.5 if name.endswith("kqv") else 1.0
            nn.init.normal_(module.weight, std=gain * module.in_features**-0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
