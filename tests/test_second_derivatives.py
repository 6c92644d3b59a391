"""Second derivatives: gradient penalties and Hessian-vector products, right on every backend that auto may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import function_of
from small_models import FAMILIES, relative_error, seeded_images, small
from torch import Tensor, nn

from t2t_fast import ops
from t2t_fast.bench import samples
from t2t_fast.bench.samples import SAMPLES, Sizes, branch
from t2t_fast.ops.common import extension

every_family = pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


SMALL = Sizes(tokens=3, channels=4, out=5, hidden=6, reduced=2, heads=2, dim=4, features=2)
OPTIONS: dict[str, dict[str, Any]] = {"linear": {"gelu": True}, "layer_norm_linear": {"gelu": True}}
OPTIONS["add_layer_norm"] = {"branch_scale": torch.tensor([0.0, 2.0], dtype=torch.float64)}
# Backends of our own that differentiate twice.
OWN = {"se_gate": "native", "se_mlp": "native"}
OWN |= dict.fromkeys(("add_layer_norm", "performer_attention", "token_performer"), "triton")
OWN |= dict.fromkeys(("soft_split", "soft_split_linear"), "triton")
CASES = [(op, b) for op in SAMPLES for b in ("auto", "aten", "reference", *([OWN[op]] if op in OWN else []))]


def make(op: str) -> tuple[Callable[..., Any], list[Tensor]]:
    """The op as a function of all its tensors, but of a layer's w; and float64 tensors that require a gradient."""
    sizes = replace(SMALL, batch=1, channels=2, grid=(5, 5)) if op.startswith("soft_split") else SMALL
    sample = samples.make(op, sizes, torch.float64)
    if op in ("se_gate", "se_mlp"):
        sample |= branch(sample["x"])
    function, inputs = function_of(op, sample, *(["w"] if "proj_weight" in sample else []), **OPTIONS.get(op, {}))
    return function, [t.requires_grad_() for t in inputs]


def second(function: Callable[..., Any], inputs: list[Tensor]) -> Tensor:
    """A Hessian-vector product of a sum of weighted squares, over all inputs."""
    results = function(*inputs)
    y = torch.cat(results) if isinstance(results, tuple) else results
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)
    gradients = torch.autograd.grad((weights * y.square()).sum(), inputs, create_graph=True, allow_unused=True)
    directions = torch.Generator().manual_seed(1)
    products = [
        (g * torch.randn(g.shape, dtype=torch.float64, generator=directions).to(g)).sum()
        for g in gradients
        if g is not None
    ]
    found = torch.autograd.grad(sum(products), inputs, allow_unused=True)
    return torch.cat([t.double().flatten() for t in found if t is not None])


@pytest.mark.parametrize(("op", "backend"), CASES)
def test_hessian_vector_products_of_ops(op: str, backend: str) -> None:
    if backend == "native" and extension.module is None:
        pytest.skip(str(extension.why_not_loaded))
    function, inputs = make(op)
    want = second(lambda *t: function(*t, backend="reference"), inputs)
    assert relative_error(second(lambda *t: function(*t, backend=backend), inputs), want) < 1e-11
    if backend == "auto":
        assert torch.autograd.gradgradcheck(lambda *t: function(*t, backend=backend), inputs, fast_mode=True)


def test_inputs_that_are_one_another() -> None:
    """Each part of a gradient counts once, though the keys are the queries, and the values computed from them."""
    (x,) = tensors((2, 2, 3, 4))
    for backend in ("auto", "aten"):
        got, want = (
            second(lambda t, b=b: ops.attention(t, t, t.square(), 0.5, backend=b), [x]) for b in (backend, "reference")
        )
        assert relative_error(got, want) < 1e-12
    (x,) = tensors((2, 3, 4))
    w = torch.randn(2, 4, dtype=torch.float64)
    got, want = (
        second(lambda t, b=b: ops.performer_attention(t, t, t.exp(), w, backend=b), [x]) for b in ("aten", "reference")
    )
    assert relative_error(got, want) < 1e-12


def test_masks_of_triton_dropout() -> None:
    """With one seed the gradient is a function of the inputs, and its derivative is the second."""
    function, inputs = make("token_performer")

    def gradient(*given: Tensor) -> Tensor:
        torch.manual_seed(7)
        y = function(*given, proj_drop=0.4, mlp_drop=0.3, backend="triton")
        return torch.autograd.grad(y.square().sum(), given[0], create_graph=True)[0]

    directions = [torch.randn_like(t) for t in inputs]
    value = (gradient(*inputs) * directions[0]).sum()
    exact = sum((g * d).sum() for g, d in zip(torch.autograd.grad(value, inputs), directions, strict=True))
    ahead, behind = (gradient(*(t + h * d for t, d in zip(inputs, directions, strict=True))) for h in (1e-6, -1e-6))
    assert relative_error(((ahead - behind) * directions[0]).sum() / 2e-6, exact) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@every_family
def test_hessian_vector_products_of_models(name: str, dtype: torch.dtype) -> None:
    def product(backend: str, dtype: torch.dtype) -> Tensor:
        model: nn.Module = small(name, backend=backend, token_drop_rate=0.0).to(dtype)
        images = seeded_images(2, 32, 32).to(dtype).requires_grad_()
        weights = [p for p in model.parameters() if p.requires_grad]
        return second(lambda x, *unused: model(x), [images, *weights])

    limit = 1e-11 if dtype == torch.float64 else 1e-4
    assert relative_error(product("auto", dtype), product("reference", torch.float64)) < limit


@every_family
def test_jvp_of_a_gradient(name: str) -> None:
    model, images = small(name).double().eval(), seeded_images(2, 32, 32).double()
    direction = torch.randn_like(images)

    def loss(x: Tensor) -> Tensor:
        return model(x).square().sum()

    _, forward_over_reverse = torch.func.jvp(torch.func.grad(loss), (images,), (direction,))
    reverse_over_reverse = torch.func.grad(lambda x: (torch.func.grad(loss)(x) * direction).sum())(images)
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (eager,) = torch.autograd.grad((gradient * direction).sum(), x)
    assert relative_error(eager, forward_over_reverse) < 1e-11
    assert relative_error(eager, reverse_over_reverse) < 1e-11


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_penalty_under_autocast(dtype: torch.dtype) -> None:
    def penalty(autocast: bool) -> Tensor:
        model = small("t2t_vit_14_se_mlp", token_drop_rate=0.0)
        images = seeded_images(2, 32, 32).requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            logits = model(images)
        (gradient,) = torch.autograd.grad(logits.float().sum(), images, create_graph=True)
        gradient.square().sum().backward()
        return model.blocks[0].attn.qkv.weight.grad

    assert relative_error(penalty(True), penalty(False)) < 0.1
