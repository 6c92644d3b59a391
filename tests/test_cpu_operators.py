"""The CPU's operators of the extension inside PyTorch: schemas, compilation, export, refusals, FLOPs, hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cpu_kernels import DIFFERENTIABLE, NATIVE, OPS, attend, attention, make, skip_unless_native_runs, step
from helpers import assert_close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import t2t_fast
from t2t_fast import BackendUnavailable, ops
from t2t_fast.bench import samples
from t2t_fast.bench.samples import Sizes


@pytest.fixture(autouse=True)
def _possible(request: pytest.FixtureRequest) -> None:
    skip_unless_native_runs(request)


def operators() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Operator name to the operator and arguments to call it with."""
    native = torch.ops.t2t_fast
    qkv = attention(2, 3, 61, 403, 5, torch.float32)
    attended = native.attention(*qkv, 0.3, True)
    kqv, *layer = samples.make("token_performer").values()
    masks = [torch.rand(2, 19, 24) for _ in range(2)]
    numbers = (1e-8, 1e-5)
    out, *sums = native.performer_layer(kqv, *masks, *layer, *numbers)
    x, weight, bias, *_ = samples.make("soft_split_linear").values()

    def learned(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [t.clone().requires_grad_() for t in tensors]

    return {
        "attention": (native.attention, (*learned(qkv), 0.3, True)),
        "attention, inference": (native.attention, (*qkv, 0.3, False)),
        "attention, backward": (native.attention_backward, (torch.randn(2, 3, 61, 5), *qkv, *attended, 0.3)),
        "token_performer": (native.performer_layer, (*learned([kqv]), *masks, *learned(layer), *numbers)),
        "token_performer, inference": (native.performer_layer, (kqv.half(), None, None, *layer, *numbers)),
        "token_performer, backward": (
            native.performer_layer_backward,
            (torch.randn_like(out), kqv, *masks, *layer, *sums, *numbers, True),
        ),
        "token_performer, backward without w": (
            native.performer_layer_backward,
            (torch.randn_like(out), kqv, None, None, *layer, *sums, *numbers, False),
        ),
        "soft_split_linear": (native.windows_linear, (x, weight, bias, (3, 3), (2, 2), (1, 1), True, 1e-5)),
        "soft_split_linear, plain": (native.windows_linear, (x, weight, None, (3, 3), (2, 2), (1, 1), False, 0.0)),
    }


NAMES = ["attention", "attention, inference", "attention, backward", "token_performer", "token_performer, inference"]
NAMES += ["token_performer, backward", "token_performer, backward without w"]
NAMES += ["soft_split_linear", "soft_split_linear, plain"]


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    assert list(operators()) == NAMES
    operator, args = operators()[name]
    torch.library.opcheck(operator, args)


@pytest.mark.parametrize("op", OPS)
def test_compiled_whole_and_for_any_batch(op: str) -> None:
    torch._dynamo.reset()
    function, _ = make(op)
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        function, tensors = make(op, Sizes(batch=batch))
        for got, want in zip(step(compiled, tensors), step(function, tensors), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_exports_without_the_package(op: str) -> None:
    function, tensors = make(op)

    class Module(nn.Module):
        def forward(self, *given: Tensor) -> Tensor:
            return function(*given)

    program = torch.export.export(Module(), tuple(tensors))
    assert "t2t_fast" not in str(program.graph)
    torch.testing.assert_close(program.module()(*tensors), function(*tensors, **NATIVE), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_torch_func_is_refused_in_words(op: str) -> None:
    function, tensors = make(op)
    batched = [tensors[0].expand(2, *tensors[0].shape), *tensors[1:]]
    axes = (0, *[None] * (len(tensors) - 1))
    with pytest.raises(BackendUnavailable, match=r"torch\.func.*forward-mode"):
        torch.func.vmap(lambda *t: function(*t, **NATIVE), axes)(*batched)
    got, want = torch.func.vmap(function, axes)(*batched), function(*tensors, **NATIVE)
    torch.testing.assert_close(got[1], want, rtol=1e-4, atol=1e-5)
    with pytest.raises(BackendUnavailable, match=r"torch\.func.*forward-mode"):
        torch.func.jvp(lambda *t: function(*t, **NATIVE), tuple(tensors), tuple(tensors))


@pytest.mark.parametrize("op", OPS)
def test_other_dtypes_and_devices_are_refused(op: str) -> None:
    words = "computes in float32" if op == "token_performer" else "matmuls are for float32 and bfloat16"
    for dtype in (torch.float64, *(() if op == "token_performer" else (torch.float16,))):
        function, tensors = make(op, dtype=dtype)
        with pytest.raises(BackendUnavailable, match=words):
            function(*tensors, **NATIVE)
        assert function(*tensors).dtype == dtype
    function, tensors = make(op)
    meta = [t.to("meta") for t in tensors]
    with pytest.raises(BackendUnavailable, match="no code for this type of device"):
        function(*meta, **NATIVE)
    assert function(*meta).shape == function(*tensors).shape
    with torch.autocast("cpu", dtype=torch.float16):
        if op != "token_performer":
            with pytest.raises(BackendUnavailable, match=words):
                function(*tensors, **NATIVE)
        assert function(*tensors).dtype == torch.float16


def test_dropout_and_gradients_that_are_refused() -> None:
    tensors = attention(1, 2, 70, 70, 8, torch.float32)
    with pytest.raises(BackendUnavailable, match="dropout on the attention weights needs library operations"):
        ops.attention(*tensors, 0.5, 0.1, **NATIVE)
    function, windows = make("soft_split_linear")
    for i in range(len(windows)):
        some = [t.detach().requires_grad_(i == j) for j, t in enumerate(windows)]
        with pytest.raises(BackendUnavailable, match="the extension's soft split has no gradient"):
            function(*some, **NATIVE)
        with torch.no_grad():
            function(*some, **NATIVE)


def taken(function: Callable[[], Any]) -> t2t_fast.dispatch.Decision:
    (decision,) = t2t_fast.explain(function).decisions
    return decision


def test_auto_takes_what_is_faster() -> None:
    few, many = attention(1, 1, 5, 5, 4, torch.float32), attention(1, 6, 197, 197, 64, torch.float32)
    assert taken(lambda: ops.attention(*few, 0.5)).backend == "aten"
    assert "few scores" in taken(lambda: ops.attention(*few, 0.5)).reasons["native"]
    assert taken(lambda: ops.attention(*many, 0.5)).backend == "native"
    assert taken(lambda: ops.attention(*many, 0.5, 0.1)).backend == "aten"
    layer, windows = samples.make("token_performer"), samples.make("soft_split_linear")
    assert taken(lambda: ops.token_performer(**layer)).backend == "native"
    assert taken(lambda: ops.soft_split_linear(**windows)).backend == "native"
    windows["weight"].requires_grad_()
    assert taken(lambda: ops.soft_split_linear(**windows)).backend == "aten"


def test_a_stage_whose_soft_split_the_library_does() -> None:
    """In float16, and where there are gradients; explain says so."""
    stage = samples.make("soft_split_performer")
    assert taken(lambda: ops.soft_split_performer(**stage)).detail == "soft split of the extension"
    half = samples.make("soft_split_performer", dtype=torch.float16)
    for sample, reason in ((half, "float32 and bfloat16"), (stage, "no gradient")):
        sample["kqv_weight"].requires_grad_(sample is stage)
        decision = taken(lambda sample=sample: ops.soft_split_performer(**sample))
        assert decision.backend == "native" and "through the library" in decision.detail and reason in decision.detail
    exact = {name: t.double() if isinstance(t, Tensor) else t for name, t in half.items()}
    want = ops.soft_split_performer(**exact, backend="reference")
    assert_close(ops.soft_split_performer(**half, **NATIVE), want, torch.float16, 180)


def flops(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_flops() -> None:
    """Two per multiply-add of every matmul that is done, those that are done again included."""
    b, h, m, n, d = 2, 3, 11, 7, 5
    tensors = [t.requires_grad_() for t in attention(b, h, m, n, d, torch.float32)]
    y = attend(0.5)(*tensors, **NATIVE)
    assert flops(lambda: attend(0.5)(*tensors, **NATIVE)) == 2 * (2 * b * h * m * n * d)
    assert flops(lambda: y.sum().backward()) == 2 * (5 * b * h * m * n * d)

    b, t, e, f, hidden = 2, 13, 6, 4, 9
    function, tensors = make("token_performer", Sizes(batch=b, tokens=t, dim=e, features=f, hidden=hidden))
    tensors = [x.requires_grad_(i != 1) for i, x in enumerate(tensors)]
    y = function(*tensors, **NATIVE)
    phi, mlp, projection = t * f * e, t * e * hidden, f * e * e
    assert flops(lambda: function(*tensors, **NATIVE)) == 2 * b * (4 * phi + t * f + 2 * mlp + projection)
    assert flops(lambda: y.sum().backward()) == 2 * b * (9 * phi + t * f + 5 * mlp + 3 * projection)
    tensors[1].requires_grad_()
    y = function(*tensors, **NATIVE)
    assert flops(lambda: y.sum().backward()) == 2 * b * (11 * phi + t * f + 5 * mlp + 3 * projection)

    function, tensors = make("soft_split_linear", Sizes(batch=2, channels=5, grid=(9, 8), out=7))
    assert flops(lambda: function(*tensors, **NATIVE)) >= 2 * (2 * 5 * 4 * 7 * 45)
    args = (*tensors[:3], (3, 3), (2, 2), (1, 1), True, 1e-5)
    assert flops(lambda: torch.ops.t2t_fast.windows_linear(*args)) == 2 * (2 * 5 * 4 * 7 * 45)


def test_saved_tensors_may_come_back_with_other_strides() -> None:
    """Hooks on saved tensors may store them as they like."""

    def reorder(t: Tensor) -> Tensor:
        return t.transpose(-2, -1).contiguous().transpose(-2, -1) if t.ndim > 1 else torch.stack((t, t), -1)[..., 0]

    for op in DIFFERENTIABLE:
        function, tensors = make(op)
        want = step(function, tensors)
        with torch.autograd.graph.saved_tensors_hooks(reorder, lambda t: t):
            got = step(function, tensors)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_any_gradient_of_the_output(op: str) -> None:
    """Expanded, as a sum's is; transposed; and, for the operator itself, of another dtype."""
    function, tensors = make(op)
    every = [t.requires_grad_() for t in tensors]
    y = function(*every, **NATIVE)
    one = torch.ones(()).expand_as(y)
    for grad in (one, torch.randn(y.shape[::-1]).permute(*range(y.ndim - 1, -1, -1))):
        want = torch.autograd.grad(y, every, grad.contiguous(), retain_graph=True)
        got = torch.autograd.grad(y, every, grad, retain_graph=True)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    operator, args = operators()[f"{op}, backward"]
    for g, w in zip(operator(args[0].double(), *args[1:]), operator(*args), strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_checkpointing(op: str) -> None:
    function, tensors = make(op)
    want = step(function, tensors)
    again = step(lambda *t, **backend: checkpoint(function, *t, use_reentrant=False, **backend), tensors)
    assert all(torch.equal(a, b) for a, b in zip(again, want, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_inference_keeps_nothing_and_changes_nothing(op: str) -> None:
    function, tensors = make(op)
    want, *_ = step(function, tensors)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(function(*(t.clone().requires_grad_() for t in tensors), **NATIVE), want)
    q, k, v = attention(1, 2, 70, 70, 8, torch.float32)
    output, lse = torch.ops.t2t_fast.attention(q, k, v, 0.5, False)
    assert lse.numel() == 0
    with pytest.raises(ValueError, match=r"lse has shape .*not to differentiate"):
        torch.ops.t2t_fast.attention_backward(output, q, k, v, output, lse, 0.5)


def test_wrong_dtypes_are_refused_by_the_operators() -> None:
    q = torch.randn(1, 2, 5, 4)
    for other in (q.half(), q.double()):
        with pytest.raises(TypeError, match="accepted: float32, bfloat16"):
            torch.ops.t2t_fast.attention(other, other, other, 0.5, False)
    with pytest.raises(TypeError, match="differ in dtype"):
        torch.ops.t2t_fast.attention(q, q.bfloat16(), q, 0.5, False)
    with pytest.raises(ValueError, match="do not fit"):
        torch.ops.t2t_fast.attention(q, q[..., :3], q[..., :3], 0.5, False)
    image, weight = torch.randn(1, 3, 8, 8, dtype=torch.float64), torch.randn(4, 27)
    with pytest.raises(TypeError, match="accepted: float32, bfloat16"):
        torch.ops.t2t_fast.windows_linear(image, weight, None, (3, 3), (2, 2), (1, 1), False, 0.0)
