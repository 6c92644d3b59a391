"""What only a GPU shows: kernels against float64 in every dtype, determinism, synchronisation, memory, sanitizers.

Every test has a twin on the CPU, in Triton's interpreter and in float32, that tries the test itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import TOLERANCES, function_of, rounding_moves
from torch import Tensor

import t2t_fast
from t2t_fast.bench import samples
from t2t_fast.bench.samples import Sizes
from t2t_fast.ops.common import extension
from t2t_fast.ops.soft_splits.arguments import Geometry

HALF = (torch.float16, torch.bfloat16)
CALLS = (
    "soft_split", "soft_split_linear", "soft_split_linear of tokens", "performer_attention", "token_performer",
    "soft_split_performer", "add_layer_norm", "se_gate", "se_mlp",
)  # fmt: skip
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def sizes_of(name: str, scale: int) -> Sizes:
    """Odd sizes, that grow with ``scale``."""
    side = 12 + 11 * scale
    if name == "soft_split_linear of tokens":
        return Sizes(channels=24, grid=(9, 7 + scale), as_tokens=True, out=40)
    if name.startswith("soft_split"):
        windows = Geometry((7, 7), (4, 4), (2, 2))
        return Sizes(batch=3, channels=3, grid=(side, side + 2), geometry=windows, out=72, features=12, hidden=20)
    hidden = 20 if name == "token_performer" else 96
    return Sizes(tokens=19 + 50 * scale, channels=40, hidden=hidden, reduced=5, features=12)


def make(
    name: str, dtype: torch.dtype, device: str, scale: int
) -> tuple[Callable[..., Any], list[Tensor], dict[str, str]]:
    """A call as a function of tensors; tensors; the backend to try, as an argument. Skips where the backend is not."""
    op, backend = name.removesuffix(" of tokens"), "native" if name.startswith("se_") else "triton"
    reason = extension.why_not(torch.empty(1, device=device)) if backend == "native" else None
    if reason is not None:
        pytest.skip(reason)
    return *function_of(op, samples.make(op, sizes_of(name, scale), dtype, device)), {"backend": backend}


@pytest.fixture
def ieee() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def differentiate(function: Callable[..., Any], tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """Results and gradients for fixed random gradients of the results."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    results = function(*leaves, **options)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.device, r.dtype) for r in results]
    return [*results, *torch.autograd.grad(results, leaves, grads)]


@on_devices
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "tf32", "float32"])  # a cut run saw these first
@pytest.mark.usefixtures("ieee", "poisoned")
def test_against_float64(name: str, precision: str, device: str) -> None:
    """Results and all gradients, at odd sizes, by norm."""
    if device == "cpu" and precision != "float32":
        pytest.skip("on the CPU float32 tries the test; the ops' own tests try the dtypes")
    dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    function, tensors, backend = make(name, dtype, device, scale=4 if device == "cuda" else 0)
    rounded = [t.double().cpu() for t in tensors]
    want = differentiate(function, rounded, backend="reference")
    got = differentiate(function, tensors, **backend)
    tolerance = TOLERANCES[torch.float16 if precision == "tf32" else dtype]  # as many digits
    moves = rounding_moves(
        lambda *t: differentiate(function, list(t), backend="reference"),
        rounded,
        torch.float16 if precision == "tf32" else dtype,
    )
    for index, (g, w, moved) in enumerate(zip(got, want, moves, strict=True)):
        assert torch.isfinite(g).all()
        error = ((g.double().cpu() - w).norm() / w.norm()).item()
        assert error <= 2 * tolerance.grad + 4 * moved, f"result or gradient {index}: {error:.2e}"


@on_devices
@pytest.mark.parametrize("name", CALLS)
def test_twice_the_same_bits(name: str, device: str) -> None:
    function, tensors, backend = make(name, torch.float32, device, scale=8 if device == "cuda" else 0)
    first, second = (differentiate(function, tensors, **backend) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@on_devices
@pytest.mark.parametrize("name", CALLS)
def test_for_the_sanitizer(name: str, device: str) -> None:
    """Small and odd, forward and backward: for compute-sanitizer, which selects tests of this name."""
    function, tensors, backend = make(name, torch.float32 if device == "cpu" else torch.float16, device, scale=0)
    assert all(torch.isfinite(t).all() for t in differentiate(function, tensors, **backend))
    with torch.no_grad():
        function(*tensors, **backend)


@on_devices
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_the_model_never_waits_for_the_gpu(mode: str, device: str) -> None:
    model = t2t_fast.create_model("t2t_vit_7", img_size=64, depth=2, drop_path_rate=0.1).to(device)
    images = torch.randn(2, 3, 64, 64, device=device)

    def step() -> None:
        with torch.set_grad_enabled(mode == "training"), torch.autocast(device, torch.bfloat16):
            logits = model.train(mode == "training")(images)
        if mode == "training":
            logits.float().square().mean().backward()

    step()  # compilation and first-time set-up may wait
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@on_devices
def test_no_allocation_as_large_as_the_long_tokens(device: str) -> None:
    """A whole training step of the token module, in which the unfolded image would be the largest tensor."""
    side = 224 if device == "cuda" else 32
    narrow = {} if device == "cuda" else {"token_dim": 16, "embed_dim": 32, "num_heads": 1}  # small weights, too
    model = t2t_fast.create_model("t2t_vit_14", img_size=side, **narrow).to(device)
    images = torch.randn(8, 3, side, side, device=device)
    backend = "auto" if device == "cuda" else "triton"
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    unfolded = images.numel() // 16 * 49 * dtype.itemsize

    def largest(backend: str) -> int:
        with t2t_fast.use_backend(backend), torch.autocast(device, dtype):
            model.tokens_to_token(images).float().square().mean().backward()
            activities = [torch.profiler.ProfilerActivity.CPU]
            with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
                model.tokens_to_token(images).float().square().mean().backward()
        kind = getattr(torch.autograd.DeviceType, device.upper())
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        return max(e.nbytes() for e in events if e.device_type() == kind)

    assert largest("reference") >= unfolded
    assert largest(backend) < unfolded


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_the_whole_model(dtype: torch.dtype, device: str) -> None:
    if device == "cpu" and dtype != torch.float32:
        pytest.skip("on the CPU float32 tries the test")
    model = t2t_fast.create_model("t2t_vit_14", img_size=64, depth=3, num_classes=20).eval()
    torch.nn.init.normal_(model.head.weight, std=0.1)
    images = torch.randn(5, 3, 64, 64)
    with torch.no_grad():
        got = model.to(device, dtype)(images.to(device, dtype)).double().cpu()
        want = model.cpu().double()(images.to(dtype).double())
    assert ((got - want).norm() / want.norm()) < {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
