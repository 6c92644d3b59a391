"""Training a tiny T2T-ViT on real images: loss curves of reference and fast paths, and no NaN in half precision."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from doubles import T2T_ViT
from torch import Tensor, nn

import t2t_fast

load_digits = pytest.importorskip("sklearn.datasets").load_digits

TINY = {"img_size": 32, "in_chans": 1, "num_classes": 10, "depth": 1, "embed_dim": 32, "num_heads": 2, "token_dim": 16}


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """The 1797 digits, 8 px enlarged to 32, black borders and all, and their labels."""
    data = load_digits()
    images = torch.from_numpy(data.images / 8 - 1)[:, None]
    return F.interpolate(images, scale_factor=4, mode="bilinear"), torch.from_numpy(data.target)


def tiny(backend: str, **kwargs: float) -> nn.Module:
    torch.manual_seed(0)
    return t2t_fast.create_model("t2t_vit_7", backend=backend, **TINY | kwargs).train()


def train(
    model: nn.Module, steps: int, lr: float, batch: int = 16, autocast: torch.dtype | None = None
) -> tuple[list[float], int]:
    """The loss of every step, and how many steps the gradient scaler skipped because of a gradient not finite."""
    images, labels = digits()
    weight = model.head.weight
    images = images.to(weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    scaler = torch.amp.GradScaler(weight.device.type, enabled=autocast == torch.float16, init_scale=2.0**10)
    draw, losses, skipped = torch.Generator().manual_seed(1), [], 0
    for _ in range(steps):
        index = torch.randint(0, 1500, (batch,), generator=draw)
        with torch.autocast(weight.device.type, dtype=autocast, enabled=autocast is not None):
            loss = F.cross_entropy(model(images[index]), labels[index])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < scale
        losses.append(loss.item())
    return losses, skipped


@functools.cache
def reference_curve(steps: int) -> list[float]:
    return train(tiny("reference", token_drop_rate=0.0).double(), steps, 1e-3)[0]


def test_loss_curves_agree_step_by_step() -> None:
    want = reference_curve(200)
    got, _ = train(tiny("aten", token_drop_rate=0.0).double(), 200, 1e-3)
    assert max(abs(a - b) for a, b in zip(got, want, strict=True)) < 1e-9  # rounding, which training amplifies
    assert sum(want[-20:]) < 0.5 * sum(want[:20])  # and it learns


def test_the_kernels_follow_the_curve() -> None:
    model = tiny("aten", token_drop_rate=0.0).double()
    for module in model.tokens_to_token.modules():  # of the blocks' ops only add_layer_norm has one
        if hasattr(module, "backend"):
            module.backend = "triton"
    got, _ = train(model, 3, 1e-3, batch=4)  # the interpreter takes its time
    want, _ = train(tiny("reference", token_drop_rate=0.0).double(), 3, 1e-3, batch=4)
    assert max(abs(a - b) for a, b in zip(got, want, strict=True)) < 1e-9


@pytest.mark.parametrize(("dtype", "lr"), [(torch.float16, 1e-3), (torch.float16, 1e-2), (torch.bfloat16, 1e-2)])
def test_no_nan_under_autocast(dtype: torch.dtype, lr: float) -> None:
    """At the width of the published models, with their dropout."""
    losses, skipped = train(tiny("auto", token_dim=64), 60, lr, autocast=dtype)
    assert all(math.isfinite(loss) for loss in losses)
    assert skipped < 5  # of a loss scale still too high
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])


def test_half_precision_einsums_make_nan() -> None:
    """The literal formulas under float16 autocast, where the denominator underflows: nothing is learned at any rate."""
    torch.manual_seed(0)
    losses, skipped = train(T2T_ViT(**TINY | {"token_dim": 64}), 12, 1e-3, autocast=torch.float16)
    assert skipped == 12  # no step had a finite gradient
    assert any(math.isnan(loss) for loss in losses)
