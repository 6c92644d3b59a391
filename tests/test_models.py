"""timm's conventions for every model: configuration, shapes, features, heads, parameter groups, copies."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import timm
import torch
from small_models import FAMILIES, MODELS, flat_gradients, seeded_images, small
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import t2t_fast
from t2t_fast.models.variants import VARIANTS

every_model = pytest.mark.parametrize("name", MODELS)
every_family = pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)


def fixed_parameters(name: str) -> set[str]:
    """Parameters without a gradient: the sinusoid table and the random features."""
    layers = ("attention1", "attention2") if VARIANTS[name].kwargs["tokens_type"] == "performer" else ()
    return {"pos_embed", *(f"tokens_to_token.{layer}.w" for layer in layers)}


def test_every_variant_is_registered() -> None:
    assert set(MODELS) == set(VARIANTS)
    assert all(timm.is_model(name) for name in VARIANTS)
    assert t2t_fast.list_models("t2t_vit_t_*") == ["t2t_vit_t_14", "t2t_vit_t_19", "t2t_vit_t_24"]


@pytest.mark.parametrize("name", sorted({*MODELS, *timm.list_pretrained("t2t_vit_*")}))
def test_default_configuration(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **({} if "dense" in name else {"depth": 1}))
        cfg = model.default_cfg
        channels, *size = cfg["input_size"]
        images = torch.empty(1, channels, *size)
        features = model.forward_intermediates(images, indices=1, intermediates_only=True)
        assert model(images).shape == (1, cfg["num_classes"])
    assert tuple(size) == model.img_size
    assert tuple(features[0].shape[2:]) == cfg["pool_size"]
    names = model.state_dict().keys()
    assert f"{cfg['classifier']}.weight" in names
    assert model.get_classifier() is model.get_submodule(cfg["classifier"])
    convolutional = VARIANTS[name.partition(".")[0]].kwargs["tokens_type"] == "convolution"
    assert cfg["first_conv"] == ("tokens_to_token.soft_split0" if convolutional else ())
    assert not convolutional or f"{cfg['first_conv']}.weight" in names


@every_model
def test_forward_and_backward(name: str) -> None:
    model = small(name).train()
    logits = model(seeded_images(2, 32, 32))
    assert logits.shape == (2, 5)
    assert torch.isfinite(logits).all()
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    logits.square().mean().backward()
    assert torch.isfinite(flat_gradients(model)).all()
    without = {key for key, parameter in model.named_parameters() if parameter.grad is None}
    assert without == fixed_parameters(name)
    dead = [key for key, p in model.named_parameters() if p.grad is not None and not p.grad.any()]
    assert not dead


@every_model
def test_number_of_images_does_not_matter(name: str) -> None:
    model, images = small(name).eval(), seeded_images(9, 32, 32)
    with torch.no_grad():
        alone = torch.cat([model(image[None]) for image in images])
        torch.testing.assert_close(model(images), alone, rtol=1e-4, atol=1e-5)
        assert model(images[:0]).shape == (0, 5)


@pytest.mark.parametrize("in_chans", [1, 4])
@every_model
def test_in_chans(name: str, in_chans: int) -> None:
    model = small(name, in_chans=in_chans)
    logits = model(seeded_images(2, 32, 32, channels=in_chans))
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert torch.isfinite(flat_gradients(model)).all()


@every_model
def test_heads_and_pools(name: str) -> None:
    model, images = small(name).eval(), seeded_images(2, 32, 32)
    width = model.num_features
    assert model.head_hidden_size == width
    tokens = model.forward_features(images)
    assert tokens.shape == (2, 1 + 4, width)
    torch.testing.assert_close(model.forward_head(tokens), model(images))  # of one token, in other matmuls
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
    for pool, want in (("token", tokens[:, 0]), ("avg", tokens[:, 1:].mean(dim=1)), ("", tokens)):
        model.reset_classifier(0, pool)
        assert isinstance(model.get_classifier(), nn.Identity)
        assert not [key for key in model.state_dict() if key.startswith("head")]
        torch.testing.assert_close(model(images), want)
        model.reset_classifier(7, pool)
        assert (model.num_classes, model.global_pool) == (7, pool)
        assert model(images).shape == (*want.shape[:-1], 7)
    model.double().reset_classifier(3)
    assert model.get_classifier().weight.dtype == torch.float64
    headless = small(name, num_classes=0, global_pool="avg").eval()
    torch.testing.assert_close(headless(images), tokens[:, 1:].mean(dim=1))


@every_model
def test_forward_intermediates(name: str) -> None:
    model, images = small(name, img_size=(48, 32)).eval(), seeded_images(2, 48, 32)
    outputs: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    final, features = model.forward_intermediates(images)
    count = len(model.blocks)
    assert len(features) == len(outputs) == len(model.feature_info) == count
    torch.testing.assert_close(final, model.forward_features(images))
    for feature, output, info in zip(features, outputs[:count], model.feature_info, strict=True):
        assert feature.shape == (2, info["num_chs"], 3, 2)
        assert feature.is_contiguous()
        assert torch.equal(feature[:, :, 2, 1], output[:, 1 + 2 * 2 + 1])

    pairs = model.forward_intermediates(
        images, indices=[0, count - 1], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    for (patches, prefix), output in zip(pairs, (outputs[0], outputs[count - 1]), strict=True):
        assert torch.equal(torch.cat((prefix, patches), dim=1), output)
    (last,) = model.forward_intermediates(images, indices=1, norm=True, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(last, model.forward_features(images)[:, 1:])

    outputs.clear()
    (first,) = model.forward_intermediates(images, indices=[0], stop_early=True, intermediates_only=True)
    assert len(outputs) == 1
    assert torch.equal(first, features[0])
    with pytest.raises(ValueError, match="output_fmt='NHWC' is unknown; accepted: NCHW, NLC"):
        model.forward_intermediates(images, output_fmt="NHWC")


def test_dense_features_of_other_widths_have_no_norm() -> None:
    model = small("t2t_vit_dense")
    assert [info["num_chs"] for info in model.feature_info] == [192, 96, 160]
    with pytest.raises(ValueError, match=r"norm=True needs features of 160 channels, got \[96, 160\]"):
        model.forward_intermediates(seeded_images(1, 32, 32), indices=2, norm=True)


@every_model
def test_features_only(name: str) -> None:
    images = seeded_images(2, 32, 32)
    extractor = small(name, features_only=True, out_indices=(0, 1)).eval()
    want = small(name).eval().forward_intermediates(images, indices=[0, 1], intermediates_only=True)
    got = extractor(images)
    assert [feature.shape[1] for feature in got] == extractor.feature_info.channels()
    assert extractor.feature_info.reduction() == [16, 16]
    for feature, expected in zip(got, want, strict=True):
        torch.testing.assert_close(feature, expected)
    assert len(small(name, out_indices=(0,)).blocks) == len(small(name).blocks)  # without features_only: no effect


@every_model
def test_prune_intermediate_layers(name: str) -> None:
    model, images = small(name).eval(), seeded_images(2, 32, 32)
    (want,) = model.forward_intermediates(images, indices=[0], intermediates_only=True)
    assert model.prune_intermediate_layers([0]) == [0]
    assert len(model.blocks) == 1
    assert isinstance(model.head, nn.Identity)
    tokens, (got,) = model.forward_intermediates(images, indices=[0])
    assert torch.equal(got, want)
    assert torch.equal(tokens, model(images))
    model.reset_classifier(4, "avg")
    assert model(images).shape == (2, 4)
    model.prune_intermediate_layers([0], prune_norm=True, prune_head=False)
    assert isinstance(model.norm, nn.Identity)
    assert model(images).shape == (2, 4)


@every_model
def test_parameter_groups(name: str) -> None:
    model = small(name)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    scale: dict[str, float] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            key = names[id(parameter)]
            assert key not in scale
            scale[key] = group["lr_scale"]
            assert (group["weight_decay"] == 0) == (parameter.ndim == 1 or key == "cls_token"), key
    assert scale.keys() == names_of_trainable(model)
    order = ["cls_token", *(f"blocks.{i}." for i in range(len(model.blocks))), "head"]
    steps = [max(value for key, value in scale.items() if key.startswith(part)) for part in order]
    assert steps[-1] == 1
    assert all(low == pytest.approx(high / 2) for low, high in itertools.pairwise(steps))
    assert {scale[key] for key in scale if key.startswith("tokens_to_token.")} == {steps[0]}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model(seeded_images(2, 32, 32)).sum().backward()
    optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == names_of_trainable(model)


def names_of_trainable(model: nn.Module) -> set[str]:
    return {key for key, parameter in model.named_parameters() if parameter.requires_grad}


@every_model
def test_copies(name: str) -> None:
    model, images = small(name, dynamic_img_size=True).eval(), seeded_images(2, 48, 32)
    want = model(images)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert list(other.state_dict()) == list(model.state_dict())
        assert {key for key, p in other.named_parameters() if p.requires_grad} == names_of_trainable(model)
        assert torch.equal(other(images), want)
        with torch.no_grad():
            other.pos_embed.add_(1)
        assert not torch.equal(other(images), want)
        assert torch.equal(model(images), want)


def checkpointed_gradients(name: str, enable: bool, backend: str | None) -> tuple[Tensor, int]:
    """Gradients in training mode with dropout, and how often the blocks ran."""
    model = small(name, drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.1).train()
    calls: list[None] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *args: calls.append(None))
    model.set_grad_checkpointing(enable)
    torch.manual_seed(3)
    if backend is None:
        loss = model(seeded_images(2, 32, 32)).square().mean()
    else:
        with t2t_fast.use_backend(backend):
            loss = model(seeded_images(2, 32, 32)).square().mean()
    loss.backward()
    return flat_gradients(model), len(calls) // len(model.blocks)


@pytest.mark.parametrize("backend", [None, "reference"])
@every_family
def test_grad_checkpointing(name: str, backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "reference":  # the recomputation too must leave library attention alone
        monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", forbidden)
    want, once = checkpointed_gradients(name, False, backend)
    got, twice = checkpointed_gradients(name, True, backend)
    assert (once, twice) == (1, 2)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)


def forbidden(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("this backend was not asked for")


def test_inference_on_the_cpu_goes_through_the_tokens_module_in_chunks() -> None:
    model, images = small("t2t_vit_7", dynamic_img_size=True).eval(), seeded_images(9, 160, 160)
    sizes: list[int] = []
    model.tokens_to_token.attention1.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    with torch.no_grad():
        chunked = model(images)
        assert sizes == [7, 2]
        with t2t_fast.use_backend("reference"):
            model(images)
    torch.testing.assert_close(chunked, model(images), rtol=1e-4, atol=1e-5)
    assert sizes == [7, 2, 9, 9]
