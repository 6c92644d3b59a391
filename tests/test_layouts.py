"""The names of the three state-dict layouts and the way between them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from t2t_fast.models.layouts import (
    LAYOUTS,
    LayoutError,
    detect_layout,
    foreign_name,
    from_official,
    official_name,
    to_official,
)

SHAPES: dict[str, dict[str, list[int]]] = json.loads(
    (Path(__file__).parent / "golden" / "state_dict_shapes.json").read_text()
)
STANDARD = [name for name in SHAPES if not name.endswith(("_se", "_ghost", "_dense"))]
REPRESENTABLE = {
    "official": list(SHAPES),
    "mmpretrain": [name for name in STANDARD if "_t_" in name],
    "paddlevit": STANDARD,
}


def numbered(name: str) -> dict[str, Tensor]:
    """The model's state dict, each tensor a different constant: no memory, yet a mix-up shows."""
    return {key: torch.tensor(float(i)).expand(shape) for i, (key, shape) in enumerate(SHAPES[name].items())}


@pytest.mark.parametrize(("layout", "name"), [(layout, n) for layout in LAYOUTS for n in REPRESENTABLE[layout]])
def test_round_trip(layout: str, name: str) -> None:
    source = numbered(name)
    foreign = from_official(source, layout)
    assert len(foreign) == len(source)
    back, detected = to_official(foreign)
    assert detected == layout
    assert list(back) == list(source)
    for key, value in source.items():
        assert back[key].shape == value.shape, key
        assert back[key].flatten()[0] == value.flatten()[0], key


@pytest.mark.parametrize("layout", ["mmpretrain", "paddlevit"])
def test_models_a_layout_lacks_raise(layout: str) -> None:
    for name in SHAPES.keys() - set(REPRESENTABLE[layout]):
        with pytest.raises(LayoutError, match=f"no place in layout='{layout}'.*standard blocks only"):
            from_official(numbered(name), layout)


@pytest.mark.parametrize(
    ("official", "mmpretrain", "paddlevit"),
    [
        ("cls_token", "backbone.cls_token", "cls_token"),
        ("pos_embed", "backbone.pos_embed", "pos_embed"),
        (
            "tokens_to_token.attention1.norm2.bias",
            "backbone.tokens_to_token.attention1.ln2.bias",
            "patch_embed.attn1.norm2.bias",
        ),
        (
            "tokens_to_token.attention2.attn.qkv.weight",
            "backbone.tokens_to_token.attention2.attn.qkv.weight",
            "patch_embed.attn2.attn.qkv.weight",
        ),
        (
            "tokens_to_token.attention2.mlp.fc1.weight",
            "backbone.tokens_to_token.attention2.ffn.layers.0.0.weight",
            "patch_embed.attn2.mlp.fc1.weight",
        ),
        ("tokens_to_token.project.bias", "backbone.tokens_to_token.project.bias", "patch_embed.proj.bias"),
        ("blocks.13.norm1.weight", "backbone.encoder.13.ln1.weight", "blocks.13.norm1.weight"),
        ("blocks.3.attn.proj.bias", "backbone.encoder.3.attn.proj.bias", "blocks.3.attn.proj.bias"),
        ("blocks.0.mlp.fc2.weight", "backbone.encoder.0.ffn.layers.1.weight", "blocks.0.mlp.fc2.weight"),
        ("norm.weight", "backbone.norm.weight", "norm.weight"),
        ("head.weight", "head.layers.head.weight", "head.weight"),
    ],
)
def test_names(official: str, mmpretrain: str, paddlevit: str) -> None:
    for layout, foreign in (("official", official), ("mmpretrain", mmpretrain), ("paddlevit", paddlevit)):
        assert foreign_name(official, layout) == foreign
        assert official_name(foreign, layout) == official


def test_performer_names_of_paddlevit() -> None:
    assert foreign_name("tokens_to_token.attention1.w", "paddlevit") == "patch_embed.attn1.w"
    assert official_name("patch_embed.attn2.mlp.2.bias", "paddlevit") == "tokens_to_token.attention2.mlp.2.bias"


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.backbone.", "backbone."]
)
def test_wrapper_prefixes_are_removed(prefix: str) -> None:
    source = numbered("t2t_vit_7")
    back, layout = to_official({prefix + key: value for key, value in source.items()})
    assert layout == "official"
    assert list(back) == list(source)


def test_compiled_submodules() -> None:
    assert official_name("blocks.0._orig_mod.norm1.weight", "official") == "blocks.0.norm1.weight"


def test_mmpretrain_without_prefix_or_with_official_token_mlp() -> None:
    source = numbered("t2t_vit_t_14")
    foreign = from_official(source, "mmpretrain")
    headless = {key.removeprefix("backbone."): value for key, value in foreign.items() if "head" not in key}
    back, layout = to_official(headless)
    assert layout == "mmpretrain"
    assert list(back) == [key for key in source if not key.startswith("head.")]

    as_mlp = {
        key.replace("ffn.layers.0.0", "mlp.fc1").replace("ffn.layers.1", "mlp.fc2")
        if "tokens_to_token" in key
        else key: v
        for key, v in foreign.items()
    }
    assert as_mlp.keys() != foreign.keys()
    back, layout = to_official(as_mlp)
    assert (list(back), layout) == (list(source), "mmpretrain")


def test_paddle_linear_weights_are_transposed_and_only_those() -> None:
    generator = torch.Generator().manual_seed(0)
    source = {
        "tokens_to_token.attention1.w": torch.randn(32, 64, generator=generator),
        "tokens_to_token.attention1.kqv.weight": torch.randn(192, 147, generator=generator),
        "tokens_to_token.attention1.proj.weight": torch.randn(64, 64, generator=generator),
        "pos_embed": torch.randn(1, 197, 8, generator=generator),
    }
    arrays = {key: value.numpy() for key, value in from_official(source, "paddlevit").items()}
    np.testing.assert_array_equal(arrays["patch_embed.attn1.w"], source["tokens_to_token.attention1.w"])
    np.testing.assert_array_equal(
        arrays["patch_embed.attn1.kqv.weight"].T, source["tokens_to_token.attention1.kqv.weight"]
    )
    back, layout = to_official(arrays)
    assert layout == "paddlevit"
    for key, value in source.items():
        assert torch.equal(back[key], value)


def test_nothing_is_dropped() -> None:
    back, _ = to_official({"cls_token": torch.zeros(1), "something.else": torch.ones(1)})
    assert list(back) == ["cls_token", "something.else"]
    with pytest.raises(LayoutError, match=r"'head\.bias' twice"):
        to_official({"head.bias": torch.zeros(1), "module.head.bias": torch.zeros(1)})
    with pytest.raises(TypeError, match=r"state_dict\['steps'\] must be a tensor or a NumPy array, got int"):
        to_official({"steps": 3})  # type: ignore[dict-item]


def test_unknown_layout() -> None:
    for function in (official_name, foreign_name):
        with pytest.raises(
            LayoutError, match="layout must be one of 'official', 'mmpretrain', 'paddlevit', got 'keras'"
        ):
            function("head.weight", "keras")


def test_detection_defaults_to_official() -> None:
    assert detect_layout([]) == "official"
    assert detect_layout(["patch_embed.proj.weight", "blocks.0.norm1.weight"]) == "official"  # a plain ViT
