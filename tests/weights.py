"""Weights for the tests of checkpoints: narrow models, state dicts of original ones, comparisons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import t2t_fast

SHAPES: dict[str, dict[str, list[int]]] = json.loads(
    (Path(__file__).parent / "golden" / "state_dict_shapes.json").read_text()
)


def constant(name: str, value: float = 0.0) -> dict[str, Tensor]:
    """The state dict of an original model, every tensor of one stored element."""
    return {key: torch.tensor(value).expand(shape) for key, shape in SHAPES[name].items()}


def small(tokens_type: str = "transformer", seed: int | None = None, **kwargs: Any) -> nn.Module:
    """A narrow T2T-ViT; with a seed, every parameter is random."""
    kwargs = {"embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 10, "img_size": 32, **kwargs}
    model = t2t_fast.create_model("t2t_vit_7", tokens_type=tokens_type, **kwargs).eval()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def assert_same(given: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert given.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(given[key], value), key
