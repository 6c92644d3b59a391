"""Multiply-accumulates: against a count by hand, the paper's figures and other models' well-known ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import nn

import t2t_fast
from t2t_fast.macs import count_macs
from t2t_fast.models.variants import VARIANTS

BY_HAND = [name for name, v in VARIANTS.items() if v.kwargs["block_type"] in ("standard", "se", "se_mlp")]


def untouched(name: str, **kwargs: Any) -> nn.Module:
    """A model without weights: counting needs none."""
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def count_by_hand(name: str, size: int) -> int:
    """Every matmul of the architecture, written out (paper §3; token_dim 64, 32 random features)."""
    kwargs = VARIANTS[name].kwargs
    dim, depth, ratio, tokens_type = (kwargs[key] for key in ("embed_dim", "depth", "mlp_ratio", "tokens_type"))
    e, m = 64, 32
    side1 = (size + 4 - 7) // 4 + 1
    side2 = (side1 + 2 - 3) // 2 + 1
    side3 = (side2 + 2 - 3) // 2 + 1

    def token_layer(tokens: int, width: int) -> int:
        if tokens_type == "convolution":
            return tokens * width * e
        performer = 2 * tokens * e * m + 2 * tokens * e * m + tokens * m  # phi of k and q; numerator; denominator
        attention = performer if tokens_type == "performer" else 2 * tokens**2 * e
        return tokens * width * 3 * e + attention + 3 * tokens * e * e  # projection and the MLP's two

    tokens = side3**2 + 1
    squeeze = 2 * dim * dim // 16 if kwargs["block_type"] in ("se", "se_mlp") else 0
    block = tokens * (4 + 2 * ratio) * dim * dim + 2 * tokens**2 * dim + squeeze
    split = token_layer(side1**2, 3 * 49) + token_layer(side2**2, 9 * e) + side3**2 * 9 * e * dim
    return int(split + depth * block + dim * 1000)


@pytest.mark.parametrize("name", BY_HAND)
def test_equals_count_by_hand(name: str) -> None:
    assert count_macs(untouched(name)).macs == count_by_hand(name, 224)
    assert count_macs(untouched(name), image_size=160).macs == count_by_hand(name, 160)


IN_PAPER = [name for name in BY_HAND if VARIANTS[name].published and name not in ("t2t_vit_7", "t2t_vit_14_wide")]


@pytest.mark.parametrize("name", IN_PAPER)
def test_within_3_percent_of_paper(name: str) -> None:
    published = VARIANTS[name].published
    assert published is not None
    macs = count_macs(untouched(name))
    assert macs.macs / 1e9 == pytest.approx(published.macs_g, rel=0.03)
    assert macs.params / 1e6 == pytest.approx(published.params_m, rel=0.03)


@pytest.mark.parametrize(
    ("name", "paper", "counted"),
    [
        ("t2t_vit_7", 1.1, 1.147),  # the paper's one decimal: 1.147 rounds to it
        ("t2t_vit_14.in1k_384", 17.1, 16.370),  # the count by hand says 16.370 as well
        ("t2t_vit_14_wide", 5.0, 5.229),  # likewise 5.229
        ("t2t_vit_16_ghost", 3.7, 3.797),
        ("t2t_vit_dense", 5.5, 5.276),
    ],
)
def test_where_paper_rounds_or_differs(name: str, paper: float, counted: float) -> None:
    macs = count_macs(untouched(name)).macs / 1e9
    assert macs == pytest.approx(counted, abs=5e-4)
    assert macs == pytest.approx(paper, rel=0.05)


def test_384_pixels_by_hand() -> None:
    expected = count_by_hand("t2t_vit_14", 384)
    assert count_macs(untouched("t2t_vit_14.in1k_384")).macs == expected
    assert count_macs(untouched("t2t_vit_14"), (384, 384)).macs == expected


@pytest.mark.parametrize(
    ("name", "giga"), [("resnet50", 4.09), ("deit_small_patch16_224", 4.60), ("swin_tiny_patch4_window7_224", 4.49)]
)
def test_other_models(name: str, giga: float) -> None:
    macs = count_macs(untouched(name))
    assert macs.macs / 1e9 == pytest.approx(giga, abs=0.01)
    assert macs.executed == macs.macs


def test_fused_attention_of_torch_is_counted() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.Sequential(nn.Flatten(2), nn.Linear(64, 32), layer)
    tokens = 3
    expected = tokens * 64 * 32 + tokens * (4 * 32 * 32 + 2 * 32 * 64) + 2 * tokens**2 * 32
    fastpath = torch.backends.mha.get_fastpath_enabled()
    assert count_macs(model, 8).macs == expected
    assert torch.backends.mha.get_fastpath_enabled() == fastpath


@pytest.mark.parametrize("backend", ["auto", "reference", "aten"])
def test_backend_makes_no_difference_and_model_is_left_alone(backend: str) -> None:
    model = t2t_fast.create_model("t2t_vit_7", img_size=64, in_chans=1, backend=backend)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = count_macs(untouched("t2t_vit_7"), 64, in_chans=3).macs - 16 * 16 * 2 * 49 * 192
    for given in (model, model.half(), torch.compile(model)):
        assert count_macs(given).macs == expected  # type: ignore[arg-type]
    model.float()
    assert model.backend == backend
    assert model.training
    assert model.img_size == (64, 64)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-3, atol=1e-3)


def test_by_module_adds_up() -> None:
    model = untouched("t2t_vit_7")
    macs = count_macs(model)
    parts = ["tokens_to_token", *(f"blocks.{i}" for i in range(7)), "head"]
    assert sum(macs.by_module[part] for part in parts) == macs.macs
    assert macs.by_module["head"] == 256 * 1000
    assert macs.params == sum(math.prod(p.shape) for p in model.parameters())


def test_image_sizes() -> None:
    model = untouched("t2t_vit_7")
    assert count_macs(model, (64, 96)).macs == count_macs(untouched("t2t_vit_7", img_size=(64, 96))).macs
    assert count_macs(untouched("vit_tiny_patch16_224", img_size=64)).macs < count_macs(untouched("resnet18")).macs
    with pytest.raises(ValueError, match=r"image_size=None, but a Sequential does not tell its own"):
        count_macs(nn.Sequential(nn.Conv2d(1, 1, 1)))
    with pytest.raises(ValueError, match="image_size must be at least 1"):
        count_macs(model, 0)
