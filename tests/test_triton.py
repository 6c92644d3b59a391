"""What every Triton op promises besides its values: registration, compilation, addresses, memory, refusals in words."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import assert_close
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import t2t_fast
from t2t_fast import BackendUnavailable, ops
from t2t_fast.bench import samples
from t2t_fast.bench.samples import Sizes
from t2t_fast.layers import TokenPerformer
from t2t_fast.ops.common.norm import Norm
from t2t_fast.ops.soft_splits import reference
from t2t_fast.ops.soft_splits.arguments import Split

pytestmark = pytest.mark.usefixtures("on_device")

SIZES = Sizes(tokens=9, channels=5, out=7, dim=16, features=8, hidden=24)
GEOMETRY = SIZES.geometry
TRITON = {"backend": "triton"}


def image(*shape: int, requires_grad: bool = True) -> Tensor:
    return torch.randn(shape, requires_grad=requires_grad)


def tensors_for(op: str, without: str = "", **sizes: Any) -> list[Tensor]:
    """The tensors of a sample of ``op`` but those with ``without`` in their names; all require a gradient."""
    named = samples.tensors_of(samples.make(op, replace(SIZES, **sizes)))
    return [t.requires_grad_() for name, t in named.items() if not without or without not in name]


def operators() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Operator name to the operator and arguments to call it with. LayerNorms are folded, except in add_layer_norm."""
    library, f32, eps = torch.ops.t2t_fast, torch.float32, 1e-5
    x, weight, offset = tensors_for("soft_split_linear", "norm")
    (as_tokens,) = tensors_for("soft_split", as_tokens=True)
    stats, tokens = torch.rand(2, 20), torch.randn(2, 20, 7)
    k, q, v, w = tensors_for("performer_attention")
    sums = (*torch.rand(2, 2, 8), torch.rand(2, 8, 16))  # over the keys
    layer = tensors_for("token_performer", "norm")
    layer[1].requires_grad_(False)  # w
    seed, plain, dropout = torch.randint(2**63 - 1, (1,)), (0.0, 0.0, 1e-8, eps), (0.1, 0.2, 1e-8, eps)
    rows = tensors_for("add_layer_norm")

    def detached(*tensors: Tensor) -> list[Tensor]:
        return [t.detach() for t in tensors]

    return {
        "soft_split": (library.soft_split, (x, *GEOMETRY)),
        "soft_split of tokens": (library.soft_split, (as_tokens.transpose(1, 2).unflatten(2, (9, 8)), *GEOMETRY)),
        "soft_split_backward": (
            library.soft_split_backward,
            (torch.randn(2, 20, 45).requires_grad_(), [2, 5, 9, 8], True, *GEOMETRY),
        ),
        "soft_split_linear": (library.soft_split_linear, (x, weight, offset, f32, *GEOMETRY, True, eps, True)),
        "soft_split_linear without": (library.soft_split_linear, (x, weight, None, f32, *GEOMETRY, False, eps, False)),
        "soft_split_linear_backward_weight": (
            library.soft_split_linear_backward_weight,
            (tokens, x.detach(), stats, stats, f32, *GEOMETRY, True, True),
        ),
        "soft_split_linear_backward_input": (
            library.soft_split_linear_backward_input,
            (tokens, *detached(x, weight, offset), tokens, stats, stats, f32, *GEOMETRY, True),
        ),
        "performer_attention": (library.performer_attention, (k, q, v, w, 1e-8)),
        "performer_attention_backward": (
            library.performer_attention_backward,
            (torch.randn(2, 9, 16), *detached(k, q, v, w), *sums, 1e-8, True),
        ),
        "token_performer": (library.token_performer, (*layer, None, f32, *plain)),
        "token_performer with dropout": (library.token_performer, (*layer, seed, f32, *dropout)),
        "token_performer_backward": (
            library.token_performer_backward,
            (torch.randn(2, 9, 16), *detached(*layer), seed, *sums, f32, *dropout),
        ),
        "add_layer_norm": (library.add_layer_norm, (*rows, torch.rand(2), eps, True)),
        "add_layer_norm without": (library.add_layer_norm, (*rows[:2], None, None, None, eps, True)),
        "add_layer_norm_backward": (
            library.add_layer_norm_backward,
            (*torch.randn(3, 2, 9, 5), *torch.rand(2, 2, 9), None, torch.rand(2), f32, f32, True),
        ),
    }


@pytest.mark.parametrize("name", list(operators()))
def test_opcheck(name: str) -> None:
    operator, args = operators()[name]
    torch.library.opcheck(operator, args)


def model_step(backend: str) -> Callable[..., Tensor]:
    def step(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        y = ops.soft_split_linear(x, weight, bias, gamma, beta, 3, 2, 1, backend=backend)
        return ops.soft_split(y, 3, 2, 1, grid=(8, 9), backend=backend).square().mean()

    return step


@pytest.mark.slow
def test_compiled_whole_and_for_any_batch() -> None:
    _, *weights = tensors_for("soft_split_linear")
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model_step("triton"), backend=count, fullgraph=True, dynamic=True)
    inductor = torch.compile(model_step("triton"), fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        x = image(batch, 5, 16, 18)
        want = torch.autograd.grad(model_step("aten")(x, *weights), (x, *weights))
        for function in (compiled, inductor):
            found = torch.autograd.grad(function(x, *weights), (x, *weights))
            for g, w in zip(found, want, strict=True):
                torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)
    assert graphs == 1


@pytest.mark.slow
def test_a_compiled_stage_trains_with_dropout_and_infers() -> None:
    stage = TokenPerformer(3, 16, 7, 4, 2, drop_rate=0.2, backend="triton").to(torch.empty(0).device)
    torch._dynamo.reset()
    compiled = torch.compile(stage, fullgraph=True, dynamic=True)
    learned = [p for p in stage.parameters() if p.requires_grad]
    for batch in (2, 3):
        x, grad = torch.randn(batch, 3, 20, 17), torch.randn(batch, 20, 16)
        torch.manual_seed(batch)
        want = torch.autograd.grad(stage(x), learned, grad)
        torch.manual_seed(batch)
        found = torch.autograd.grad(compiled(x), learned, grad)
        # Inductor draws seeds of its own: the masks differ, their use does not.
        assert all(f.isfinite().all() and f.shape == w.shape for f, w in zip(found, want, strict=True))
    stage.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), stage(x), rtol=1e-5, atol=1e-6)
    for p in (stage.dp, stage.mlp[3]):
        p.p = 0.0
    stage.train()
    want = torch.autograd.grad(stage(x), learned, grad)
    for f, w in zip(torch.autograd.grad(compiled(x), learned, grad), want, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-4, atol=1e-5)


def test_compiled_forward_mode_is_left_to_the_library() -> None:
    x, tangent = image(1, 3, 8, 8, requires_grad=False), image(1, 3, 8, 8, requires_grad=False)
    weight = torch.randn(4, 27)

    def derivative(x: Tensor, tangent: Tensor) -> Tensor:
        def function(x: Tensor) -> Tensor:
            return ops.soft_split_linear(x, weight, None, None, None, 3, 1, 1, **TRITON)

        return torch.func.jvp(function, (x,), (tangent,))[1]

    with pytest.raises(BackendUnavailable, match=r"torch\.func.*forward-mode"):
        derivative(x, tangent)
    torch._dynamo.reset()
    with pytest.raises((BackendUnavailable, torch._dynamo.exc.TorchDynamoException), match="forward-mode"):
        torch.compile(derivative, backend="eager", fullgraph=True)(x, tangent)


def test_float32_products_obey_the_switch() -> None:
    from t2t_fast.kernels.launch import precision

    before = torch.get_float32_matmul_precision()
    try:
        for setting, wanted in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert precision(torch.float32) == wanted
            assert precision(torch.float64) == precision(torch.float16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_partial_sums_fill_a_gpu_but_never_outgrow_the_long_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from t2t_fast.kernels import launch, soft_split_linear_backward
    from t2t_fast.kernels.lay_windows import lay_windows

    monkeypatch.setattr(launch, "_chip_of", lambda device: launch.Chip(90, 132))
    windows = lay_windows(torch.empty(1, 28, 28, 64).permute(0, 3, 1, 2), SIZES.geometry)
    for num_tokens in (0, 1, 196, 784, 8 * 196, 128 * 784):
        splits = soft_split_linear_backward.num_splits(num_tokens, windows, 384, torch.bfloat16)
        assert 1 <= splits <= max(1, num_tokens * 2 // (8 * 384))
    assert splits > 4


@pytest.mark.gpu
def test_captured_in_a_cuda_graph() -> None:
    x, weight = image(2, 3, 32, 32), image(24, 147)

    def step() -> tuple[Tensor, ...]:
        tokens = ops.soft_split_linear(x, weight, None, torch.ones(147), None, 7, 4, 2, **TRITON)
        y = ops.performer_attention(*tokens.chunk(3, -1), torch.ones(4, 8), **TRITON)
        return torch.autograd.grad(y.sum(), (x, weight))

    step()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.normal_()
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
def test_a_captured_layer_draws_new_masks() -> None:
    sample = samples.make("token_performer", replace(SIZES, tokens=50), torch.bfloat16)

    def step() -> Tensor:
        return ops.token_performer(**sample, proj_drop=0.5, mlp_drop=0.5, **TRITON)

    step()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = step()
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append(captured.clone())
    assert not torch.equal(*replays)


def test_flops_are_counted_as_for_the_literal_form() -> None:
    def flops(backend: str) -> int:
        tensors = tensors_for("soft_split_linear", channels=3, grid=(16, 16), out=8)
        with FlopCounterMode(display=False) as counter:
            ops.soft_split_linear(*tensors, 3, 2, 1, backend=backend).sum().backward()
        return counter.get_total_flops()

    assert flops("triton") == flops("reference") == 3 * 2 * (2 * 8 * 8) * 27 * 8


def test_addresses_beyond_32_bits() -> None:
    """Image, rows and columns too far apart for a 32-bit offset; only the pages touched exist."""
    far = 2**31 + 64
    storage = torch.empty(2 * far + 4096, dtype=torch.float16)
    near = torch.randn(2, 2, 5, 5, dtype=torch.float16)
    weight = (torch.randn(8, 18) / 4).half()
    for strides in ((far, 25, 5, 1), (50, far, 5, 1), (50, 25, far // 4, 1), (50, 25, 1, far // 4)):
        x = storage.as_strided((2, 2, 5, 5), strides)
        x.copy_(near)
        want = ops.soft_split(near, 3, 2, 1, backend="reference")
        assert torch.equal(ops.soft_split(x, 3, 2, 1, backend="triton"), want)
        got = ops.soft_split_linear(x, weight, None, None, None, 3, 2, 1, backend="triton")
        assert_close(got, want.double() @ weight.double().T, torch.float16, 18)


def test_no_tensor_as_large_as_the_long_tokens() -> None:
    channels, side, out = 64, 28, 24
    grid = (side, side)
    x, *weights = tensors_for("soft_split_linear", channels=channels, grid=grid, as_tokens=True, out=out)
    unfolded = 2 * (side // 2) ** 2 * 9 * channels * 4
    largest = {}
    for backend in ("triton", "reference"):
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            y = ops.soft_split_linear(x, *weights, 3, 2, 1, grid=grid, backend=backend)
            y.sum().backward()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        largest[backend] = max(event.nbytes() for event in events)
    assert largest["reference"] >= unfolded  # the measurement sees such a tensor
    # The image's gradient, the largest that there must be, is less than half of them.
    assert largest["triton"] == x.numel() * 4 < unfolded / 2


def test_statistics_are_kept_only_for_training() -> None:
    operator, args = operators()["soft_split_linear"]
    assert [t.shape for t in operator(*args)[1:]] == [(2, 20), (2, 20)]
    *before, _ = args
    assert [t.numel() for t in operator(*before, False)[1:]] == [0, 0]


def test_the_input_gets_no_gradient_that_nobody_wants() -> None:
    x, weight = image(2, 3, 12, 12, requires_grad=False), image(8, 27)
    with FlopCounterMode(display=False) as counter:
        ops.soft_split_linear(x, weight, None, None, None, 3, 2, 1, backend="triton").sum().backward()
    counted = {str(name) for name in counter.get_flop_counts()["Global"]}
    assert counted == {"t2t_fast.soft_split_linear", "t2t_fast.soft_split_linear_backward_weight"}


def refusals(*tensors: str, before: str = "", **environment: str) -> list[str]:
    """What explain says of Triton for each of ``tensors``, code for x and w, in one process."""
    code = f"""
import torch, t2t_fast
from t2t_fast import ops
{before}
for tensors in {tensors}:
    x, w = eval(tensors)
    told = str(t2t_fast.explain(lambda: ops.soft_split_linear(x, w, None, None, None, 3, 1, 1)))
    print(*(line for line in told.splitlines() if "triton: " in line))
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_refusals_say_why() -> None:
    data = "torch.randn(1, 3, 8, 8), torch.randn(4, 27)"
    meta = "torch.empty(1, 3, 8, 8, device='meta'), torch.empty(4, 27, device='meta')"
    bf16 = "torch.randn(1, 3, 8, 8).bfloat16(), torch.randn(4, 27).bfloat16()"
    on_cpu, on_meta = refusals(data, meta)
    assert re.search("on the CPU.* TRITON_INTERPRET=1", on_cpu)
    assert re.search("no Triton kernels for this type of device", on_meta)
    for_tests, in_bfloat16 = refusals(data, bf16, TRITON_INTERPRET="1")
    assert "interpreter is for tests" in for_tests
    assert "interpreter multiplies bfloat16 wrongly" in in_bfloat16
    hide = "import importlib.util; importlib.util.find_spec = lambda name: None"
    (not_installed,) = refusals(data, before=hide)
    assert re.search(r"not installed.*pip install triton", not_installed)


@pytest.mark.parametrize(
    ("device", "target", "reason"),
    [
        ("cuda", ("hip", "gfx942"), "configurations are for NVIDIA GPUs"),
        ("xpu", ("xpu", 20), "configurations are for NVIDIA GPUs"),
        ("cuda", ("cuda", 75), r"the kernels need compute capability 8\.0 or newer"),
        ("mps", None, "no Triton kernels for this type of device"),
    ],
)
def test_other_hardware_takes_the_library(
    device: str, target: tuple[str, int | str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from t2t_fast.ops.common import triton as availability

    monkeypatch.setattr(availability, "triton_is_interpreted", lambda: False)
    monkeypatch.setattr(availability, "_target", lambda device: target)
    assert re.search(reason, str(availability._device_reason(torch.device(device))))
    if target is not None:
        monkeypatch.setattr(availability, "_target", lambda device: ("cuda", 80))
        assert availability._device_reason(torch.device(device)) is None


def test_other_dtypes_are_refused() -> None:
    x, weight = image(1, 3, 8, 8).half(), image(4, 27)
    with pytest.raises(TypeError, match="x has dtype float16, weight float32; cast one of them"):
        ops.soft_split_linear(x, weight, None, None, None, 3, 1, 1, backend="triton")


def test_autocast_takes_16_bit_tokens_and_float32_weights() -> None:
    """As in every layer of a model under autocast but the first."""
    x, weight = torch.randn(2, 3, 9, 9).half(), torch.randn(4, 27)
    with torch.autocast(x.device.type, dtype=torch.float16):
        got = ops.soft_split_linear(x, weight, None, torch.ones(27), None, 3, 2, 1, **TRITON)
    split = Split(GEOMETRY, None, Norm(torch.ones(27).double(), None, 1e-5))
    want = reference.soft_split_linear(x.double(), weight.double(), None, split)
    assert got.dtype == torch.float16
    assert_close(got, want, torch.float16, 27)


def test_the_model_takes_the_kernels() -> None:
    model = t2t_fast.create_model("t2t_vit_7", img_size=32, depth=1, num_classes=3).to(torch.empty(0).device)
    images = torch.randn(2, 3, 32, 32)
    with t2t_fast.use_backend("reference"):
        want = model.eval()(images)
    ran = t2t_fast.explain(model, images).backends()
    assert "triton" not in ran["soft_split_performer"] | ran["soft_split_linear"]  # float32, IEEE
    with t2t_fast.use_backend("triton"):
        tokens = model.tokens_to_token(images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.tokens_to_token, "forward", lambda x: tokens)
        got = model(images)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_reference_is_what_the_operator_computes() -> None:
    operator, (x, weight, offset, *rest) = operators()["soft_split_linear"]
    centred = weight - weight.mean(1, keepdim=True)
    tokens, mean, rstd = operator(x, centred, offset, *rest)
    split = Split(GEOMETRY, None, Norm(torch.ones(45), None, 1e-5))
    want = reference.soft_split_linear(x, centred, offset, split)
    torch.testing.assert_close(tokens, want)
    patches = ops.soft_split(x, *GEOMETRY, backend="reference")
    torch.testing.assert_close(mean, patches.mean(-1))
    torch.testing.assert_close(rstd, torch.rsqrt(patches.var(-1, correction=0) + 1e-5))


def test_explain_tells_which_kernels_a_stage_takes() -> None:
    def told(*shape: int, train: bool = False, **kwargs: Any) -> str:
        stage = TokenPerformer(3, *shape, 7, 4, 2, backend="triton", **kwargs).to(torch.empty(0).device).train(train)
        with torch.set_grad_enabled(train):
            return str(t2t_fast.explain(stage, torch.randn(1, 3, 16, 16)))

    assert told(16).startswith("soft_split_performer x1: triton (soft_split_linear, then token_performer)\n")
    assert "triton (soft_split_linear, then token_performer)" in told(16, train=True)
    assert "then attention kernels, then library operations: the layer is wider than the 64 channels" in told(72)
    tensors = tensors_for("token_performer")

    def call() -> Tensor:
        return ops.token_performer(*tensors, **TRITON)

    with torch.no_grad():
        assert "triton (fused)" in str(t2t_fast.explain(call))
    assert "attention kernels, then library operations: w is to be learned" in str(t2t_fast.explain(call))
