"""Images of any height and width: fixed and dynamic sizes, the table's interpolation and its cache."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from small_models import FAMILIES, seeded_images, small
from torch import Tensor, nn

import t2t_fast
from t2t_fast.layers import TokensToToken
from t2t_fast.models import pos_embed
from t2t_fast.models.pos_embed import resize_table, sinusoid_table

every_family = pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)
SIZES = [(32, 32), (33, 47), (47, 33), (32, 96), (65, 48), (50, 34)]
every_size = pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")


def final_grid(height: int, width: int) -> tuple[int, int]:
    """What three strided windows (k7 s4 p2; k3 s2 p1; k3 s2 p1) leave of a side, one after the other."""
    sides = []
    for side in (height, width):
        for kernel, stride, padding in ((7, 4, 2), (3, 2, 1), (3, 2, 1)):
            side = len(range(0, side + 2 * padding - kernel + 1, stride))
        sides.append(side)
    return sides[0], sides[1]


def built_for(name: str, size: tuple[int, int], table: Tensor) -> nn.Module:
    """A model with a fixed image size, given another one's position table."""
    model = small(name, img_size=size).eval()
    with torch.no_grad():
        model.pos_embed.copy_(table)
    return model


def test_grids() -> None:
    for size in [*SIZES, *itertools.product(range(16, 120, 7), range(16, 120, 13)), (224, 224), (384, 512)]:
        assert TokensToToken.grids(*size)[2] == final_grid(*size)
    assert TokensToToken.grids(224, 224) == ((56, 56), (28, 28), (14, 14))


@every_size
@every_family
def test_fixed_size(name: str, size: tuple[int, int]) -> None:
    model = small(name, img_size=size).eval()
    height, width = final_grid(*size)
    assert model.grid_size == (height, width)
    assert torch.equal(model.pos_embed.detach(), sinusoid_table(1 + height * width, model.embed_dim))
    images = seeded_images(5, *size)
    with t2t_fast.use_backend("reference"):
        want = model(images)
    torch.testing.assert_close(model(images), want, rtol=1e-4, atol=1e-5)
    (feature,) = model.forward_intermediates(images, indices=1, intermediates_only=True)
    assert feature.shape[2:] == (height, width)


@every_size
@every_family
def test_dynamic_size(name: str, size: tuple[int, int]) -> None:
    model, images = small(name, dynamic_img_size=True).eval(), seeded_images(2, *size)
    table = resize_table(model.pos_embed.detach(), (2, 2), final_grid(*size))
    want = built_for(name, size, table)(images)
    torch.testing.assert_close(model(images), want)
    resized = small(name).eval()
    resized.set_input_size(size)
    assert resized.img_size == size
    assert not resized.pos_embed.requires_grad
    torch.testing.assert_close(resized(images), want)
    (feature,) = model.forward_intermediates(images, indices=1, intermediates_only=True)
    assert feature.shape[2:] == final_grid(*size)


@pytest.mark.parametrize("size", [(224, 320), (255, 193)])
def test_large_images(size: tuple[int, int]) -> None:
    model, images = small("t2t_vit_7", img_size=224, dynamic_img_size=True).eval(), seeded_images(1, *size)
    with torch.no_grad():
        table = resize_table(model.pos_embed, (14, 14), final_grid(*size))
        torch.testing.assert_close(model(images), built_for("t2t_vit_7", size, table)(images), rtol=1e-4, atol=1e-5)


def test_set_input_size_there_and_back() -> None:
    model = small("t2t_vit_7", img_size=64).eval()
    images = seeded_images(2, 64, 64)
    want = model(images)
    model.set_input_size(64)
    assert torch.equal(model(images), want)
    model.set_input_size((96, 48))
    with pytest.raises(ValueError, match=r"\(4, 4\), .*built for \(6, 3\)"):
        model(images)
    with pytest.raises(ValueError, match="img_size must be at least 16, got 8"):
        model.set_input_size(8)


def test_resizing_keeps_the_class_row_and_the_orientation() -> None:
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(4.0), indexing="ij")
    table = torch.cat((torch.tensor([[7.0, 7.0]]), torch.stack((rows, columns), dim=-1).flatten(0, 1)))[None]
    resized = resize_table(table, (6, 4), (12, 8))
    assert torch.equal(resized[:, 0], table[:, 0])
    maps = resized[0, 1:].unflatten(0, (12, 8))
    assert (maps[:, :, 0].diff(dim=0)[2:-2] > 0).all()
    torch.testing.assert_close(maps[:, :, 0].diff(dim=1), torch.zeros(12, 7), atol=1e-5, rtol=0)
    assert (maps[:, :, 1].diff(dim=1)[:, 2:-2] > 0).all()
    assert resize_table(table, (6, 4), (6, 4)) is table


@every_family
def test_the_same_number_of_tokens_in_another_shape(name: str) -> None:
    fixed = small(name, img_size=(32, 64)).eval()
    wide, tall = seeded_images(2, 32, 64), seeded_images(2, 64, 32)
    fixed(wide)
    with pytest.raises(ValueError, match=r"\(4, 2\), .*built for \(2, 4\)"):
        fixed(tall)
    dynamic = small(name, img_size=(32, 64), dynamic_img_size=True).eval()
    table = resize_table(fixed.pos_embed.detach(), (2, 4), (4, 2))
    assert not torch.allclose(table, fixed.pos_embed)
    for _ in range(2):
        assert torch.equal(dynamic(wide), fixed(wide))
        torch.testing.assert_close(dynamic(tall), built_for(name, (64, 32), table)(tall))


class CountedResizing:
    """Counts the interpolations of position tables."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        monkeypatch.setattr(pos_embed, "resize_table", self)

    def __call__(self, *args: object) -> Tensor:
        self.calls += 1
        return resize_table(*args)  # type: ignore[arg-type]


def test_cache_hits(monkeypatch: pytest.MonkeyPatch) -> None:
    count = CountedResizing(monkeypatch)
    model = small("t2t_vit_7", dynamic_img_size=True).eval()
    for _ in range(3):
        for size in ((32, 32), (48, 32), (32, 48)):
            model(seeded_images(1, *size))
    assert count.calls == 2
    for width in range(64, 64 + 16 * 20, 16):
        model(seeded_images(1, 32, width))
    assert len(model._tables) <= 16
    assert copy.deepcopy(model)._tables == {}


def test_cache_is_never_stale() -> None:
    size, images = (48, 32), seeded_images(2, 48, 32)
    model = small("t2t_vit_7", dynamic_img_size=True).eval()

    def check() -> None:
        table = resize_table(model.pos_embed.detach(), model.grid_size, (3, 2))
        want = built_for("t2t_vit_7", size, table).to(table.dtype)(images.to(table.dtype))
        for _ in range(2):
            torch.testing.assert_close(model(images.to(table.dtype)), want, rtol=1e-3, atol=1e-4)

    check()
    for step in range(4):  # assigned tables may get the address of a freed one
        for assign in (False, True):
            table = torch.full_like(model.pos_embed, 0.5 * step) + torch.arange(256.0).sin() * assign
            model.load_state_dict({**model.state_dict(), "pos_embed": table}, assign=assign)
            del table
            check()
    model.double()
    check()
    model.float()
    check()
    with torch.no_grad():
        model.pos_embed.mul_(0.5)
    check()
    model.set_input_size((32, 64))
    check()
    model.pos_embed = nn.Parameter(torch.randn_like(model.pos_embed), requires_grad=False)
    check()


def test_a_trainable_table_gets_its_gradient() -> None:
    model = small("t2t_vit_7", dynamic_img_size=True)
    model(seeded_images(1, 48, 32))
    model.pos_embed.requires_grad_()
    model(seeded_images(1, 48, 32)).sum().backward()
    assert model.pos_embed.grad is not None
    assert model.pos_embed.grad.abs().sum() > 0


def test_inference_mode_and_training_share_a_model() -> None:
    model, images = small("t2t_vit_7", dynamic_img_size=True).eval(), seeded_images(2, 48, 32)
    with torch.inference_mode():
        want = model(images).clone()
        born_there = small("t2t_vit_7", dynamic_img_size=True).eval()
        torch.testing.assert_close(born_there(images), want)
        torch.testing.assert_close(born_there(images), want)
    logits = model(images)
    torch.testing.assert_close(logits.detach(), want)
    logits.sum().backward()
    assert model.cls_token.grad is not None
