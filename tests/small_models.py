"""Models for tests: any of the registered ones cut down to run in milliseconds, and seeded weights and images."""

from __future__ import annotations

import functools
import zlib
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

import t2t_fast

MODELS = t2t_fast.list_models()
# One model for each kind of token layer and of block.
FAMILIES = {
    "performer": "t2t_vit_7",
    "transformer": "t2t_vit_t_14",
    "convolution": "t2t_vit_c_14",
    "se": "t2t_vit_14_se",
    "se_mlp": "t2t_vit_14_se_mlp",
    "ghost": "t2t_vit_16_ghost",
    "dense": "t2t_vit_dense",
}


def small(name: str, **kwargs: Any) -> nn.Module:
    """``timm.create_model(name)`` for 32 px and 5 classes with two blocks (a dense one: two stages), seeded."""
    arguments = {"img_size": 32, "num_classes": 5, "depth": 2, **kwargs}
    if name == "t2t_vit_dense":
        arguments.setdefault("block_config", (1, arguments["depth"] - 1))
    return seed_weights(timm.create_model(name, **arguments), seed=1)


def smallest(name: str, **kwargs: Any) -> nn.Module:
    """:func:`small` with a single block (a dense one: two stages)."""
    return small(name, depth=2 if name == "t2t_vit_dense" else 1, **kwargs)


def quickest(name: str, **kwargs: Any) -> nn.Module:
    """:func:`smallest` for tests that compile or export every family, which takes seconds for attention tokens.

    The models of :data:`FAMILIES` differ in their tokens or in their blocks. Those with blocks of their own get the
    convolutional tokens: Performer and softmax-attention tokens are compiled once each, with their own model.
    """
    tokens = {} if name in (FAMILIES["performer"], FAMILIES["transformer"]) else {"tokens_type": "convolution"}
    return smallest(name, **tokens, **kwargs)


def seed_weights(model: nn.Module, seed: int) -> nn.Module:
    """Set every state-dict entry but the position table to numbers that depend on its name and ``seed`` alone."""
    with torch.no_grad():
        for key, value in model.state_dict().items():
            name = key.removeprefix("model.")  # timm's wrapper around models for features
            if name != "pos_embed":
                value.copy_(torch.from_numpy(_seeded_array(name, tuple(value.shape), seed)))
    return model


def seeded_images(batch: int, height: int, width: int, seed: int = 1, channels: int = 3) -> Tensor:
    """(batch, channels, height, width) float32 images, standard normal."""
    draw = np.random.default_rng([seed, zlib.crc32(b"images")]).standard_normal((batch, channels, height, width))
    return torch.from_numpy(draw.astype(np.float32))


def relative_error(got: Tensor, want: Tensor) -> float:
    """``|got - want| / |want|`` in the Frobenius norm, in float64."""
    assert got.shape == want.shape
    got, want = got.detach().double(), want.detach().double()
    return ((got - want).norm() / want.norm()).item()


def flat_gradients(model: nn.Module) -> Tensor:
    """All gradients of ``model`` as one float64 vector; every trainable parameter must have one."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, grad in grads.items() if grad is None]
    return torch.cat([grad.double().flatten() for grad in grads.values() if grad is not None])


@functools.lru_cache(maxsize=2048)  # tests build the same models again and again
def _seeded_array(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    draw = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape)
    if name.endswith(".w"):  # random features
        draw = 0.7 * draw
    elif name == "cls_token":
        draw = 0.5 * draw
    elif name.endswith("bias"):
        draw = 0.1 * draw
    elif len(shape) == 1:  # a norm's weight
        draw = 1 + 0.1 * draw
    else:
        draw = draw / np.sqrt(np.prod(shape[1:]))
    return draw.astype(np.float32)
