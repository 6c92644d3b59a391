"""What the native se_gate and se_mlp promise besides their values: residual form, registration, compilation, memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import TOLERANCES, assert_close, leaves
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import t2t_fast
from t2t_fast import BackendUnavailable, ops
from t2t_fast.bench import samples
from t2t_fast.bench.samples import Sizes, branch
from t2t_fast.layers.block import Block
from t2t_fast.ops.common import extension

pytestmark = pytest.mark.usefixtures("on_device")

BACKENDS = ("reference", "aten", "native")
NATIVE = {"backend": "native"}
NAMES = ("se_gate", "se_mlp")


def arguments(name: str, images: int = 3, tokens: int = 11, dim: int = 20, hidden: int = 37) -> list[Tensor]:
    """Positional arguments of an op, the tokens first."""
    sizes = Sizes(batch=images, tokens=tokens, channels=dim, hidden=hidden)
    return list(samples.make(name, sizes).values())


def call(name: str, tensors: Sequence[Tensor], **kwargs: Any) -> Tensor:
    return getattr(ops, name)(*tensors, **kwargs)


def step(name: str, tensors: Sequence[Tensor], backend: str, **kwargs: Any) -> list[Tensor]:
    """The result and the gradients of a weighted sum of it, by all tensors."""
    every = [t.detach().requires_grad_() for t in (*tensors, *kwargs.values())]
    named = dict(zip(kwargs, every[len(tensors) :], strict=True))
    y = call(name, every[: len(tensors)], backend=backend, **named)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.device)
    return [y, *torch.autograd.grad((y.double() * weights).sum(), every)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_residual_and_scale(name: str, backend: str, dtype: torch.dtype) -> None:
    tensors = [t.to(dtype) for t in arguments(name)]
    extra = {key: t.to(dtype) for key, t in branch(tensors[0]).items()}
    exact, more = [t.double() for t in tensors], {key: t.double() for key, t in extra.items()}
    plain = call(name, exact, backend="reference")
    want = step(name, exact, "reference", **more)
    assert_close(want[0], more["residual"] + more["branch_scale"][:, None, None] * plain, torch.float64, 1)
    for i, (got, w) in enumerate(zip(step(name, tensors, backend, **extra), want, strict=True)):
        assert got.dtype == dtype
        assert_close(got, w, dtype, 2 * 11 * 37, grad=i > 0, conditioning=TOLERANCES[dtype].unit)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_of_the_residual_form(name: str) -> None:
    tensors = arguments(name, 2, 4, 5, 6)
    inputs = leaves(*tensors, *branch(tensors[0]).values())

    def function(*every: Tensor) -> Tensor:
        return call(name, every[:-2], residual=every[-2], branch_scale=every[-1], **NATIVE)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_a_residual_of_another_dtype_promotes(name: str) -> None:
    for dtype, residual in [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
    ]:
        tensors = [t.to(dtype) for t in arguments(name)]
        extra = {"residual": torch.randn(tensors[0].shape).to(residual)}
        want = step(name, tensors, "reference", **extra)
        got = step(name, tensors, "native", **extra)
        assert [t.dtype for t in got] == [t.dtype for t in want]
        for g, w in zip(got, want, strict=True):
            assert_close(g, w, dtype, 500, grad=True, conditioning=TOLERANCES[dtype].unit)


@pytest.mark.usefixtures("poisoned")
def test_gelu_far_from_zero_is_exact() -> None:
    x = torch.tensor([-1e30, -1e4, -8.0, 8.0, 1e4]).reshape(1, 5, 1).expand(1, 5, 3).contiguous()
    eye, no_gate = torch.eye(3), torch.zeros(1, 3)  # a gate of one half
    y = ops.se_mlp(x, eye, None, eye, None, no_gate, no_gate.T, **NATIVE)
    assert torch.equal(y, x.clamp_min(0) / 2)
    x[0, 2, 1] = torch.nan
    assert ops.se_mlp(x, eye, None, eye, None, no_gate, no_gate.T, **NATIVE)[0, :, 1].isnan().all()


@pytest.mark.parametrize("name", NAMES)
def test_strides_empty_batches_and_single_tokens(name: str) -> None:
    for images, tokens, dim in [(0, 5, 8), (1, 1, 1), (5, 3, 7), (2, 300, 65)]:
        tensors = arguments(name, images, tokens, dim)
        strided = [tensors[0].transpose(1, 2).contiguous().transpose(1, 2), *tensors[1:]]
        strided[-1] = tensors[-1].T.contiguous().T
        for got, want in zip(step(name, strided, "native"), step(name, tensors, "native"), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        exact = step(name, [t.double() for t in tensors], "reference")
        for got, want in zip(step(name, tensors, "native"), exact, strict=True):  # sums over a single token cancel
            assert_close(got, want, torch.float32, 2 * tokens * 37, grad=True, conditioning=1e-5)
    expanded = arguments(name, 1)
    expanded[0] = expanded[0].expand(4, -1, -1)
    torch.testing.assert_close(call(name, expanded, **NATIVE), call(name, expanded, backend="reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_deterministic_with_any_number_of_threads(name: str, dtype: torch.dtype) -> None:
    tensors, before = [t.to(dtype) for t in arguments(name, 7, 197, 64, 128)], torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3, before, before):
            torch.set_num_threads(threads)
            results.append(step(name, tensors, "native"))
    finally:
        torch.set_num_threads(before)
    for got, again in zip(results[-1], results[-2], strict=True):
        assert torch.equal(got, again)
    for other in results[:2]:
        for got, want in zip(other, results[-1], strict=True):
            assert_close(got, want, dtype, 7 * 197 * 128, grad=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(name: str, dtype: torch.dtype) -> None:
    tensors = arguments(name)
    extra = branch(tensors[0])
    with torch.autocast(tensors[0].device.type, dtype=dtype):
        want = step(name, tensors, "reference", **extra)
        got = step(name, tensors, "native", **extra)  # backward inside the region, too
        assert call(name, tensors, **NATIVE).dtype == call(name, tensors, backend="reference").dtype
    assert [t.dtype for t in got] == [t.dtype for t in want]
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, dtype, 500, grad=True, conditioning=TOLERANCES[dtype].unit)


def operators() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Operator name to the operator and arguments to call it with."""
    native = torch.ops.t2t_fast
    gate, mlp = arguments("se_gate"), arguments("se_mlp")
    extra = tuple(branch(gate[0]).values())
    whole = [t.requires_grad_() for t in (*mlp, *extra)]
    kept = [t.detach() for t in native.se_mlp(*mlp, *extra, True)[1:]]
    plain = [t.detach() for t in mlp]
    no_bias = [None if i in (2, 4) else t for i, t in enumerate(plain)]
    return {
        "se_gate": (native.se_gate, (*[t.requires_grad_() for t in gate], *extra)),
        "se_gate alone": (native.se_gate, (*gate, None, None)),
        "se_gate_backward": (
            native.se_gate_backward,
            (
                torch.randn(3, 11, 20),
                plain[0],
                torch.randn(3, 20),
                torch.rand(3, 3),
                torch.rand(3, 20),
                *plain[5:],
                None,
            ),
        ),
        "se_mlp": (native.se_mlp, (*whole, True)),
        "se_mlp, inference": (native.se_mlp, (*no_bias, None, None, False)),
        "se_mlp_backward": (
            native.se_mlp_backward,
            (torch.randn(3, 11, 20), *plain, extra[1].detach(), *kept),
        ),
    }


@pytest.mark.parametrize("name", list(operators()))
def test_opcheck(name: str) -> None:
    operator, args = operators()[name]
    torch.library.opcheck(operator, args)


@pytest.mark.parametrize("name", NAMES)
def test_compiled_whole_and_for_any_batch(name: str) -> None:
    def function(x: Tensor, residual: Tensor, branch_scale: Tensor, *weights: Tensor) -> Tensor:
        return call(name, [x, *weights], residual=residual, branch_scale=branch_scale, **NATIVE).square().mean()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for images in (2, 3, 5):
        x, *weights = arguments(name, images)
        every = [t.requires_grad_() for t in (x, *branch(x).values(), *weights)]
        want = torch.autograd.grad(function(*every), every)
        for got, w in zip(torch.autograd.grad(compiled(*every), every), want, strict=True):
            torch.testing.assert_close(got, w, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_exports_without_the_package(name: str) -> None:
    class Module(nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return call(name, tensors)

    tensors = arguments(name)
    program = torch.export.export(Module(), tuple(tensors))
    assert "t2t_fast" not in str(program.graph)
    torch.testing.assert_close(program.module()(*tensors), call(name, tensors, **NATIVE))


def test_torch_func_is_refused_in_words() -> None:
    tensors = arguments("se_gate")
    with pytest.raises(BackendUnavailable, match=r"torch\.func.*forward-mode"):
        torch.func.vmap(lambda x: ops.se_gate(x[None], *tensors[1:], **NATIVE))(tensors[0])
    torch.func.vmap(lambda x: ops.se_gate(x[None], *tensors[1:]))(tensors[0])


def test_other_dtypes_and_devices_are_refused() -> None:
    tensors = arguments("se_mlp")
    tensors[0] = tensors[0].half()
    with pytest.raises(TypeError, match="x has dtype float16, fc1_weight float32; cast one of them"):
        ops.se_mlp(*tensors, **NATIVE)
    meta = [t.to("meta") for t in arguments("se_gate")]
    with pytest.raises(BackendUnavailable, match="no code for this type of device"):
        ops.se_gate(*meta, **NATIVE)
    assert ops.se_gate(*meta).shape == meta[0].shape


def test_auto_takes_what_is_faster_on_the_cpu() -> None:
    def taken(function: Callable[[], Tensor]) -> str:
        (decision,) = t2t_fast.explain(function).decisions
        return decision.backend

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        gate, one, mlp = arguments("se_gate"), arguments("se_gate", 1), arguments("se_mlp")
        if gate[0].device.type != "cpu":
            pytest.skip("a policy of the CPU")
        assert taken(lambda: ops.se_mlp(*mlp)) == "native"
        assert taken(lambda: ops.se_mlp(*arguments("se_mlp", 1))) == "aten"
        assert taken(lambda: ops.se_mlp(*leaves(*mlp))) == "native"
        assert taken(lambda: ops.se_gate(*gate)) == "aten"
        assert taken(lambda: ops.se_gate(*gate, residual=gate[0])) == "native"
        assert taken(lambda: ops.se_gate(*one, residual=one[0])) == "aten"
        assert taken(lambda: ops.se_gate(*(t.bfloat16() for t in one))) == "native"
    finally:
        torch.set_num_threads(threads)


def test_bad_branches_are_named() -> None:
    tensors = arguments("se_gate")
    with pytest.raises(
        ValueError, match=r"residual must have shape that of the result = \(3, 11, 20\), got \(3, 11, 2\)"
    ):
        ops.se_gate(*tensors, residual=torch.randn(3, 11, 2))
    with pytest.raises(ValueError, match=r"branch_scale must have shape \(B,\) = \(3,\), got \(2,\)"):
        ops.se_mlp(*arguments("se_mlp"), branch_scale=torch.ones(2))


def test_flops_are_counted_as_for_the_literal_form() -> None:
    def flops(backend: str) -> int:
        tensors = [t.requires_grad_() for t in arguments("se_mlp")]
        with FlopCounterMode(display=False) as counter:
            ops.se_mlp(*tensors, backend=backend).sum().backward()
        return counter.get_total_flops()

    assert flops("native") == flops("reference")


def test_inference_keeps_no_hidden_layer() -> None:
    tensors = arguments("se_mlp", 64, 50, 32, 256)
    hidden = 64 * 50 * 256 * 4
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ops.se_mlp(*tensors, **NATIVE)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    largest = max(event.nbytes() for event in events)
    assert largest >= 64 * 50 * 32 * 4
    if tensors[0].device.type == "cpu":
        assert largest < hidden


@pytest.mark.gpu
def test_captured_in_a_cuda_graph() -> None:
    tensors = [t.requires_grad_() for t in arguments("se_mlp")]

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(ops.se_mlp(*tensors, **NATIVE).sum(), tensors)

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        tensors[0].normal_()
    graph.replay()
    for got, want in zip(captured, run(), strict=True):
        assert torch.equal(got, want)


def block(block_type: str, **kwargs: Any) -> Block:
    return Block(32, 2, 3.0, block_type=block_type, **kwargs)


@pytest.mark.parametrize("block_type", ["se", "se_mlp"])
def test_a_block_adds_its_branch_in_the_gates_pass(block_type: str) -> None:
    op = "se_gate" if block_type == "se" else "se_mlp"
    layer, x = block(block_type, drop_path=0.5).train(), torch.randn(max(6, torch.get_num_threads()), 5, 32)
    results: list[Tensor] = []
    for hooked in (False, True):  # a hook on the branch makes the block add it in the literal way
        branches: list[Callable[[], None]] = []
        if hooked:
            for module in (layer.attn, layer.mlp):
                branches.append(module.register_forward_hook(lambda *args: None).remove)
        torch.manual_seed(3)
        results.append(layer(x))
        for remove in branches:
            remove()
    torch.testing.assert_close(results[0], results[1])
    assert not torch.allclose(results[0], layer.eval()(x))
    assert t2t_fast.explain(layer, x).backends()[op] == {"native"}, extension.why_not_loaded


@pytest.mark.parametrize("block_type", ["se", "se_mlp"])
def test_dropout_keeps_its_place(block_type: str) -> None:
    layer, x = block(block_type, drop=0.3).train(), torch.randn(6, 5, 32)
    torch.manual_seed(3)
    got = layer(x)
    torch.manual_seed(3)
    want = x + layer.attn(layer.norm1(x))
    want = want + layer.mlp(layer.norm2(want))
    torch.testing.assert_close(got, want)
