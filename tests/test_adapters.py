"""Adapters, hooks and patches on any part of a model: whoever replaces or watches a Linear or a norm has it called."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import FAMILIES, relative_error, seeded_images, small
from torch import Tensor, nn

import t2t_fast

every_family = pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)


class Adapter(nn.Module):
    """A low-rank update beside a Linear, without attributes of a Linear's."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.down = nn.Linear(inner.in_features, 2, bias=False)
        self.up = nn.Linear(2, inner.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.up(self.down(x))


def linears(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if type(m) is nn.Linear]


@every_family
def test_an_adapter_on_any_linear(name: str) -> None:
    """Each gives the logits of a model whose weights the update was added to, and gets a gradient."""
    images, original = seeded_images(2, 32, 32), small(name).eval()
    for place in linears(original):
        model, merged = (copy.deepcopy(original) for _ in range(2))
        torch.manual_seed(0)
        adapter = Adapter(model.get_submodule(place))
        model.set_submodule(place, adapter)
        with torch.no_grad():
            merged.get_submodule(place).weight.add_(adapter.up.weight @ adapter.down.weight)
        logits = model(images)
        assert relative_error(logits, merged(images)) < 2e-5, place
        logits.square().sum().backward()
        assert adapter.up.weight.grad.norm() > 0, place
        assert relative_error(t2t_fast.freeze(model)(images), logits) < 2e-5, place


@every_family
def test_hooks_and_patches_on_any_linear_and_norm(name: str) -> None:
    """A forward hook, and a forward set on the module itself (as accelerate does), see one call each."""
    images = seeded_images(2, 32, 32)
    model = small(name).eval()
    want = model(images)
    places = [*linears(model), *(n for n, m in model.named_modules() if type(m) is nn.LayerNorm)]
    for place in places:
        part, seen = model.get_submodule(place), list[Tensor]()
        handle = part.register_forward_hook(lambda m, args, y, s=seen: s.append(y))
        assert relative_error(model(images), want) < 2e-5, place
        handle.remove()
        assert len(seen) == 1, place
        part.forward = lambda x, p=part, s=seen: s.append(x) or type(p).forward(p, x)
        assert relative_error(model(images), want) < 2e-5, place
        del part.forward
        assert len(seen) == 2, place
