"""What the constructor's arguments reach, official names, and the errors about bad arguments and images."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import timm
import torch
from small_models import FAMILIES, MODELS, seeded_images, small
from timm.layers import DropPath
from torch import Tensor, nn

import t2t_fast
from t2t_fast import T2TViT, T2TViTDense
from t2t_fast.layers import GhostAttention, Transition
from t2t_fast.models.variants import VARIANTS

every_family = pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    return [block for block in model.blocks if not isinstance(block, Transition)]


def dropout_rates(module: nn.Module) -> set[float]:
    return {m.p for m in module.modules() if isinstance(m, nn.Dropout)}


@pytest.mark.parametrize("name", [name for name in MODELS if name != "t2t_vit_14_se_mlp"])
def test_official_names(name: str) -> None:
    with torch.device("meta"):
        with pytest.warns(UserWarning, match=f"Mapping deprecated model name T{name[1:]} to current {name}"):
            legacy = timm.create_model("T" + name[1:])
        ours = t2t_fast.create_model("T" + name[1:])
    assert isinstance(legacy, T2TViTDense if "dense" in name else T2TViT)
    for model in (legacy, ours):
        assert len(transformer_blocks(model)) == VARIANTS[name].kwargs["depth"]
        assert model.default_cfg["architecture"] == name


@every_family
def test_dropout_rates(name: str) -> None:
    model = small(name, drop_rate=0.2, attn_drop_rate=0.3, token_drop_rate=0.4)
    assert model.pos_drop.p == 0.2
    tokens_type = VARIANTS[name].kwargs["tokens_type"]
    fixed = {"performer": {0.4}, "transformer": {0.0}, "convolution": set()}[tokens_type]
    assert dropout_rates(model.tokens_to_token) == fixed
    for block in transformer_blocks(model):
        assert block.attn.attn_drop.p == 0.3
        assert block.attn.proj_drop.p == 0.2
        assert dropout_rates(block.mlp) == {0.2}
    images = seeded_images(2, 32, 32)
    torch.manual_seed(0)
    noisy = model.train()(images)
    assert not torch.equal(noisy, model(images))
    assert torch.equal(model.eval()(images), model(images))
    plain = small(name)
    assert dropout_rates(plain) == ({0.0, 0.1} if tokens_type == "performer" else {0.0})
    assert torch.equal(plain.eval()(images), model(images))


@every_family
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_attention_dropout_alone_is_at_work_in_training(name: str, backend: str) -> None:
    model = small(name, attn_drop_rate=0.5, token_drop_rate=0.0, backend=backend).train()
    images = seeded_images(2, 32, 32)
    assert not torch.equal(model(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"in_chans": 0}, ValueError, "in_chans must be at least 1, got 0"),
        ({"in_chans": "3"}, TypeError, "in_chans must be an int, got '3'"),
        ({"num_classes": -1}, ValueError, "num_classes must be at least 0, got -1"),
        ({"token_dim": 0}, ValueError, "token_dim must be at least 1, got 0"),
        ({"depth": 0}, ValueError, "depth must be at least 1, got 0"),
        ({"drop_path_rate": 1.5}, ValueError, r"drop_path_rate must be in \[0, 1\), got 1.5"),
        ({"drop_rate": "0.1"}, TypeError, "drop_rate must be a number, got '0.1'"),
        ({"attn_drop_rate": float("nan")}, ValueError, r"attn_drop_rate must be in \[0, 1\), got nan"),
        ({"token_drop_rate": True}, TypeError, "token_drop_rate must be a number, got True"),
        ({"num_classes": 10.0}, TypeError, "num_classes must be an int, got 10.0"),
        ({"num_classes": True}, TypeError, "num_classes must be an int, got True"),
        ({"num_classes": 10**20}, ValueError, "num_classes must be at most 2147483647, got 1000"),
        ({"num_heads": 2.0}, TypeError, "num_heads must be an int, got 2.0"),
        ({"num_heads": "4"}, TypeError, "num_heads must be an int, got '4'"),
        ({"mlp_ratio": "3"}, TypeError, "mlp_ratio must be a number, got '3'"),
        ({"mlp_ratio": float("inf")}, ValueError, "mlp_ratio must be finite, got inf"),
        ({"mlp_ratio": -1}, ValueError, "mlp_ratio must leave at least one hidden channel of 256, got -1"),
        ({"qk_scale": "a"}, TypeError, "qk_scale must be a number, got 'a'"),
        ({"qk_scale": float("nan")}, ValueError, "qk_scale must be finite, got nan"),
        ({"qkv_bias": "False"}, TypeError, "qkv_bias must be True or False, got 'False'"),
        ({"img_size": 32.5}, TypeError, "img_size must be an int or a pair of ints, got 32.5"),
        ({"img_size": (32, "32")}, TypeError, r"img_size must be an int or a pair of ints, got \(32, '32'\)"),
        ({"img_size": 10**21}, ValueError, "img_size must be at most 2147483647, got 1000"),
        ({"dynamic_img_size": 2}, TypeError, "dynamic_img_size must be True or False, got 2"),
        ({"token_dim": 1}, ValueError, r"a Performer token layer needs token_dim \* 0.5 >= 1, got token_dim=1"),
        ({"embed_dim": 8, "block_type": "se"}, ValueError, "gate needs a width of at least 16, got 8"),
        ({"dtype": torch.int8}, TypeError, "dtype must be float16, bfloat16, float32 or float64, got torch.int8"),
        ({"not_an_argument": 1}, TypeError, "not_an_argument"),
    ],
)
def test_impossible_arguments_are_named(kwargs: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        t2t_fast.create_model("t2t_vit_7", **kwargs)


@pytest.mark.parametrize("name", [3, True, b"t2t_vit_7", ["t2t_vit_7"]])
def test_a_name_must_be_a_string(name: Any) -> None:
    with pytest.raises(TypeError, match=re.escape(f"name must be a str, got {name!r}")):
        t2t_fast.create_model(name)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"growth_rate": 0}, ValueError, "growth_rate must be at least 1, got 0"),
        ({"growth_rate": 2.0}, TypeError, "growth_rate must be an int, got 2.0"),
        ({"block_config": "11"}, TypeError, "block_config must be a sequence of ints, got '11'"),
        ({"block_config": (1, 0)}, ValueError, "block_config must be at least 1, got 0"),
        ({"block_config": (1, 1.5)}, TypeError, "block_config must be an int, got 1.5"),
    ],
)
def test_impossible_arguments_of_dense_models(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        T2TViTDense(**{"img_size": 32, "embed_dim": 32, "num_heads": 2, "block_config": (1, 1), **kwargs})


def test_a_wrong_weight_tag_is_named() -> None:
    with pytest.raises(ValueError, match=r"'t2t_vit_7\.nonsense' .*accepted: t2t_vit_7"):
        t2t_fast.create_model("t2t_vit_7.nonsense")


def test_a_scale_of_zero_is_taken_at_its_word() -> None:
    scales = [block.attn.scale for block in small("t2t_vit_7", qk_scale=0.0).blocks]
    assert scales == [0.0] * len(scales)


@every_family
def test_stochastic_depth_is_linear(name: str) -> None:
    model = small(name, depth=5, drop_path_rate=0.4)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in transformer_blocks(model)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert not any(isinstance(module, DropPath) for module in small(name).modules())


@every_family
def test_attention_scale_and_bias(name: str) -> None:
    images = seeded_images(2, 32, 32)
    plain, scaled = small(name).eval(), small(name, qk_scale=0.7).eval()
    for model, scale in ((plain, None), (scaled, 0.7)):
        for block in transformer_blocks(model):
            width = block.attn.proj.out_features
            assert block.attn.scale == pytest.approx(scale or (width // model.blocks[0].attn.num_heads) ** -0.5)
    assert not torch.allclose(plain(images), scaled(images))
    for bias in (False, True):
        for block in transformer_blocks(small(name, qkv_bias=bias)):
            ghost = isinstance(block.attn, GhostAttention)
            layers = (block.attn.q, block.attn.k, block.attn.v) if ghost else (block.attn.qkv,)
            assert all((layer.bias is not None) == bias for layer in layers)


@every_family
def test_token_dim_and_norm_layer(name: str) -> None:
    model = small(name, token_dim=48, norm_layer=partial(nn.LayerNorm, eps=1e-3))
    tokens = model.tokens_to_token
    if VARIANTS[name].kwargs["tokens_type"] == "convolution":
        assert tokens.soft_split0.out_channels == tokens.soft_split1.out_channels == tokens.project.in_channels == 48
    else:
        assert tokens.project.in_features == 48 * 9
        assert tokens.attention2.norm1.normalized_shape == (48 * 9,)
        assert tokens.attention1.norm2.normalized_shape == (48,)
    norms = [model.norm, *(norm for block in transformer_blocks(model) for norm in (block.norm1, block.norm2))]
    assert {norm.eps for norm in norms} == {1e-3}
    assert {m.eps for m in tokens.modules() if isinstance(m, nn.LayerNorm)} <= {1e-5}
    assert model(seeded_images(2, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tokens_type": "conv"}, "tokens_type='conv' .*: performer, transformer, convolution"),
        ({"block_type": "sse"}, "block_type='sse' .*: standard, se, se_mlp, ghost, dense"),
        ({"global_pool": "max"}, "global_pool='max' .*: 'token', 'avg', ''"),
        ({"num_heads": 5}, "num_heads=5 must divide .*256"),
        ({"num_heads": 0}, "num_heads=0 must divide .*256"),
        ({"img_size": 15}, "img_size must be at least 16, got 15"),
        ({"img_size": (224, 8)}, r"img_size must be at least 16, got \(224, 8\)"),
        ({"backend": "cuda"}, "backend='cuda' .*: auto, reference, aten, triton, native"),
        ({"block_type": "ghost"}, "ghost .*mlp_ratio=3 .*even width"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small("t2t_vit_7", **kwargs)


def test_bad_arguments_of_the_classes() -> None:
    with pytest.raises(ValueError, match=r"block_type='dense' .*T2TViTDense"):
        T2TViT(img_size=32, embed_dim=64, depth=1, num_heads=2, block_type="dense")
    with pytest.raises(ValueError, match=r"depth=3 must be the sum of block_config=\(1, 1\)"):
        small("t2t_vit_dense", depth=3, block_config=(1, 1))
    with pytest.raises(TypeError, match="img_size must be an int or a pair of ints, got 'big'"):
        small("t2t_vit_7", img_size="big")
    with pytest.raises(ValueError, match="global_pool='map' is unknown"):
        small("t2t_vit_7").reset_classifier(3, "map")


@pytest.mark.parametrize("method", ["forward", "forward_intermediates"])
@every_family
def test_wrong_images(name: str, method: str) -> None:
    call = getattr(small(name).eval(), method)
    with pytest.raises(ValueError, match=r"images .*\(B, 3, H, W\), got \(2, 1, 32, 32\).*in_chans"):
        call(seeded_images(2, 32, 32, channels=1))
    with pytest.raises(ValueError, match=r"images must have 4 dimensions, got 3 \(shape \(3, 32, 32\)\)"):
        call(seeded_images(1, 32, 32)[0])
    with pytest.raises(ValueError, match=r"\(3, 2\), .*\(2, 2\).*img_size=\(H, W\)"):
        call(seeded_images(2, 48, 32))
    with pytest.raises(ValueError, match="images must be at least 3 px high and wide, got 32 x 2"):
        call(seeded_images(1, 32, 2))
    with pytest.raises(TypeError, match=r"images has dtype torch\.uint8; accepted: float16, bfloat16"):
        call(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@every_family
def test_backend_argument(name: str) -> None:
    images = seeded_images(2, 32, 32)
    by_backend: dict[str, Tensor] = {}
    for backend in ("reference", "aten"):
        model = small(name, backend=backend).eval()
        with t2t_fast.use_backend("aten"):  # the model's own word wins
            ran = t2t_fast.explain(model, images).backends()
        assert ran
        assert set().union(*ran.values()) == {backend}
        by_backend[backend] = model(images)
        switched = small(name).eval()
        switched.set_backend(backend)
        assert torch.equal(switched(images), by_backend[backend])
    torch.testing.assert_close(by_backend["aten"], by_backend["reference"], rtol=1e-4, atol=1e-5)
