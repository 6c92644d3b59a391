"""Second derivatives: gradient penalties and Hessian-vector products, right on every backend that auto may take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import FAMILIES, relative_error, seeded_images, small
from torch import Tensor, nn

from t2t_fast import ops
from t2t_fast.ops.common import extension

every_family = pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def add_layer_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
    scale = torch.tensor([0.0, 2.0], dtype=x.dtype)
    return torch.cat(ops.add_layer_norm(x, y, weight, bias, branch_scale=scale, **options))


LAYER = [(4, 4), (4,), (4,), (4,), (6, 4), (6,), (4, 6), (4,)]
OPS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]], tuple[str, ...]]] = {
    "linear": (lambda *t, **o: ops.linear(*t, gelu=True, **o), [(2, 3, 4), (5, 4), (5,)], ()),
    "layer_norm_linear": (
        lambda *t, **o: ops.layer_norm_linear(*t, gelu=True, **o),
        [(2, 3, 4), (5, 4), (5,), (4,), (4,)],
        (),
    ),
    "mlp": (ops.mlp, [(2, 3, 4), (5, 4), (5,), (4, 5), (4,)], ()),
    "add_layer_norm": (add_layer_norm, [(2, 3, 4), (2, 3, 4), (4,), (4,)], ("triton",)),
    "se_gate": (
        lambda x, r, e, res, s, **o: ops.se_gate(x, r, e, residual=res, branch_scale=s, **o),
        [(2, 3, 4), (2, 4), (4, 2), (2, 3, 4), (2,)],
        ("native",),
    ),
    "se_mlp": (
        lambda *t, **o: ops.se_mlp(*t[:7], residual=t[7], branch_scale=t[8], **o),
        [(2, 3, 4), (5, 4), (5,), (4, 5), (4,), (2, 4), (4, 2), (2, 3, 4), (2,)],
        ("native",),
    ),
    "attention": (lambda q, k, v, **o: ops.attention(q, k, v, 0.5, **o), [(2, 2, 3, 4)] * 3, ()),
    "performer_attention": (ops.performer_attention, [(2, 3, 4)] * 3 + [(2, 4)], ("triton",)),
    "token_performer": (
        lambda *t, **o: ops.token_performer(t[0], t[1].detach(), *t[2:], **o),
        [(1, 3, 12), (2, 4), *LAYER],
        ("triton",),
    ),
    "soft_split": (lambda x, **o: ops.soft_split(x, 3, 2, 1, **o), [(1, 2, 5, 5)], ("triton",)),
    "soft_split_linear": (
        lambda *t, **o: ops.soft_split_linear(*t, 3, 2, 1, **o),
        [(1, 2, 5, 5), (4, 18), (4,), (18,), (18,)],
        ("triton",),
    ),
    "soft_split_performer": (
        lambda *t, **o: ops.soft_split_performer(*t[:5], t[5].detach(), *t[6:], 3, 2, 1, **o),
        [(1, 2, 5, 5), (12, 18), (12,), (18,), (18,), (2, 4), *LAYER],
        (),
    ),
}
CASES = [(op, backend) for op in OPS for backend in ("auto", "aten", "reference", *OPS[op][2])]


def second(function: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
    """A Hessian-vector product of a sum of weighted squares, over all inputs."""
    y = function(*inputs)
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
    function, shapes, _ = OPS[op]
    inputs = tensors(*shapes)
    want = second(lambda *t: function(*t, backend="reference"), inputs)
    assert relative_error(second(lambda *t: function(*t, backend=backend), inputs), want) < 1e-11
    if backend == "auto" and "token_performer" not in op and op != "soft_split_performer":  # whose w is detached here
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
    inputs, w = tensors((1, 3, 12), *LAYER), torch.randn(2, 4, dtype=torch.float64)

    def gradient(kqv: Tensor, *layer: Tensor) -> Tensor:
        torch.manual_seed(7)
        y = ops.token_performer(kqv, w, *layer, 0.4, 0.3, backend="triton")
        return torch.autograd.grad(y.square().sum(), kqv, create_graph=True)[0]

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
