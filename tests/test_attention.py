"""ops.attention: scaled_dot_product_attention against the written-out softmax."""

from __future__ import annotations

import pytest
import torch
from helpers import MATMULS, assert_close, gradients, hand_written, leaves, skip_unless_possible, with_dtypes
from torch import Tensor

from t2t_fast import ops
from t2t_fast.bench import samples
from t2t_fast.ops.softmax_attention import reference

BACKENDS = ("reference", "aten")
ALL = (*BACKENDS, "native")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("backend", "dtype"), with_dtypes(ALL))
@pytest.mark.parametrize(("heads", "tokens", "dim"), [(1, 61, 64), (6, 17, 64), (32, 5, 12), (2, 1, 7)])
def test_forward_and_gradients(backend: str, heads: int, tokens: int, dim: int, dtype: torch.dtype) -> None:
    skip_unless_possible(backend, dtype)
    *qkv, _ = samples.make("attention", samples.Sizes(tokens=tokens, heads=heads, dim=dim), dtype).values()
    scale = 147**-0.5  # not 1/sqrt(dim): the token transformer's scale is that of its input width
    exact = [t.double() for t in qkv]
    want = torch.softmax(torch.einsum("bhnd,bhmd->bhnm", exact[0], exact[1]) * scale, -1) @ exact[2]
    got = ops.attention(*qkv, scale, backend=backend)
    assert got.dtype == dtype
    assert_close(got, want, dtype, tokens)
    if tokens == 1:
        return  # softmax over one score: the gradients of q and k vanish
    grad = torch.randn_like(want).to(dtype)
    wanted = reference.attention_backward(grad.double(), *exact, scale)
    found = gradients(lambda q, k, v: ops.attention(q, k, v, scale, backend=backend), qkv, grad)
    for g, w in zip(found, wanted, strict=True):
        assert_close(g, w, dtype, tokens * dim, grad=True)


@pytest.mark.parametrize(
    ("backend", "dtype"), [*((b, torch.float16) for b in BACKENDS), *(("native", d) for d in MATMULS)]
)
def test_large_scores(backend: str, dtype: torch.dtype) -> None:
    """Scores beyond float16 before they are scaled."""
    skip_unless_possible(backend, dtype)
    q, k, v = (60 * torch.randn(3, 1, 1, 16, 64)).to(dtype).unbind()
    want = torch.softmax(q.double() @ k.double().transpose(-2, -1) * 64**-0.5, -1) @ v.double()
    got = ops.attention(q, k, v, 64**-0.5, backend=backend)
    assert_close(got, want, dtype, 16, conditioning=2e-5 if dtype == torch.float32 else 0)  # scores of 28,000


def test_gradcheck() -> None:
    inputs = leaves(*torch.randn(3, 1, 2, 4, 3).unbind())
    for backend in BACKENDS:
        assert torch.autograd.gradcheck(lambda q, k, v, b=backend: ops.attention(q, k, v, 0.3, backend=b), inputs)
    by_hand = hand_written(
        lambda q, k, v, scale: reference.attention(q, k, v, scale, 0.0),
        reference.attention_backward,
        3,
    )
    assert torch.autograd.gradcheck(by_hand, (*inputs, 0.3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_keeps_the_mean(backend: str) -> None:
    q = torch.zeros(1, 1, 400, 4)
    v = torch.ones(1, 1, 400, 4)
    got = ops.attention(q, q, v, 0.5, 0.25, backend=backend)
    assert abs(got.mean().item() - 1) < 0.02
    assert got.std().item() > 0.01
    with pytest.raises(ValueError, match=r"dropout_p must be in \[0, 1\), got 1\.0"):
        ops.attention(q, q, v, 0.5, 1.0)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", ["aten", "native"])
@pytest.mark.parametrize(("images", "heads", "tokens"), [(5, 6, 197), (2, 1, 1100), (1, 3, 110), (1, 3, 1), (0, 2, 5)])
def test_bfloat16_on_the_cpu_in_blocks(backend: str, images: int, heads: int, tokens: int) -> None:
    """Several groups of images, several blocks of rows, their remainders, and an empty batch."""
    skip_unless_possible(backend, torch.bfloat16)
    sizes = samples.Sizes(batch=images, tokens=tokens, heads=heads, dim=16)
    *qkv, scale = samples.make("attention", sizes, torch.bfloat16).values()
    exact = [t.double() for t in qkv]
    want = torch.softmax(exact[0] @ exact[1].transpose(-2, -1) * scale, -1) @ exact[2]
    got = ops.attention(*qkv, scale, backend=backend)
    assert got.dtype == torch.bfloat16
    assert_close(got, want, torch.bfloat16, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ops.attention(*(t.float() for t in qkv), scale, backend=backend)
    assert got.dtype == torch.bfloat16
    assert_close(got, want, torch.bfloat16, tokens)
    if images == 0 or tokens == 1:
        return
    grad = torch.randn_like(want).bfloat16()
    wanted = reference.attention_backward(grad.double(), *exact, scale)
    found = gradients(lambda q, k, v: ops.attention(q, k, v, scale, backend=backend), qkv, grad)
    for g, w in zip(found, wanted, strict=True):
        assert_close(g, w, torch.bfloat16, tokens, grad=True)


@pytest.mark.parametrize("backend", ["aten", "native"])
def test_second_derivative_in_bfloat16(backend: str) -> None:
    skip_unless_possible(backend, torch.bfloat16)
    inputs = [t.bfloat16().requires_grad_() for t in torch.randn(3, 1, 2, 5, 4)]
    exact = [t.detach().double().requires_grad_() for t in inputs]

    def twice(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        (dq,) = torch.autograd.grad(ops.attention(q, k, v, 0.5, backend=backend).pow(2).sum(), q, create_graph=True)
        return torch.autograd.grad(dq.pow(2).sum(), k)[0]

    got, want = twice(*inputs, backend).double(), twice(*exact, "reference")
    assert (got - want).norm() < 0.1 * want.norm()
