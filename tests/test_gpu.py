"""What only a GPU shows: kernels against float64 in every dtype, determinism, synchronisation, memory, sanitizers.

Every test has a twin on the CPU, in Triton's interpreter and in float32, that tries the test itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import TOLERANCES, rounding_moves
from torch import Tensor

import t2t_fast
from t2t_fast import ops
from t2t_fast.ops.common import extension

HALF = (torch.float16, torch.bfloat16)
CALLS = (
    "soft_split", "soft_split_linear", "soft_split_linear of tokens", "performer_attention", "token_performer",
    "soft_split_performer", "add_layer_norm", "se_gate", "se_mlp",
)  # fmt: skip
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def make(name: str, scale: int = 1) -> tuple[Callable[..., Any], list[Tensor | None], str]:
    """A call with odd sizes, as a function of a backend and tensors; float64 tensors; the backend to try."""

    def new(*shape: int, like: float = 1.0) -> Tensor:
        return torch.randn(shape, dtype=torch.float64) * like

    side, tokens = 12 + 11 * scale, 19 + 50 * scale
    layer = [new(24, 24, like=0.2), *new(3, 24), new(20, 24, like=0.2), new(20), new(24, 20, like=0.2), new(24)]
    layer[2] = 1 + 0.1 * layer[2]
    image, patches = new(3, 3, side, side + 2), 3 * 49
    split = [new(72, patches, like=patches**-0.5), new(72), 1 + 0.1 * new(patches), new(patches)]
    w = 0.3 * new(12, 24)
    geometry = (7, 4, 2)
    blocks = [new(96, 40, like=0.2), new(96), new(40, 96, like=0.1), new(40)]
    rows, norm = new(2, tokens, 40), [1 + 0.1 * new(40), new(40)]
    gate = [new(5, 40, like=0.2), new(40, 5, like=0.5)]
    grid = (9, 7 + scale)
    as_tokens = [new(2, grid[0] * grid[1], 24), new(40, 216, like=0.07), new(40), 1 + 0.1 * new(216), new(216)]
    calls: dict[str, tuple[Callable[..., Any], list[Tensor | None], str]] = {
        "soft_split": (lambda x, **k: ops.soft_split(x, *geometry, **k), [image], "triton"),
        "soft_split_linear": (lambda *t, **k: ops.soft_split_linear(*t, *geometry, **k), [image, *split], "triton"),
        "soft_split_linear of tokens": (
            lambda *t, **k: ops.soft_split_linear(*t, 3, 2, 1, grid=grid, **k),
            as_tokens,
            "triton",
        ),
        "performer_attention": (
            lambda kqv, w, **k: ops.performer_attention(*kqv.chunk(3, -1), w, **k),
            [new(2, tokens, 72), w],
            "triton",
        ),
        "token_performer": (ops.token_performer, [new(2, tokens, 72), w, *layer], "triton"),
        "soft_split_performer": (
            lambda *t, **k: ops.soft_split_performer(*t, *geometry, **k),
            [image, *split, w, *layer],
            "triton",
        ),
        "add_layer_norm": (ops.add_layer_norm, [rows, new(2, tokens, 40), *norm], "triton"),
        "se_gate": (ops.se_gate, [rows, *gate], "native"),
        "se_mlp": (ops.se_mlp, [rows, *blocks, *gate], "native"),
    }
    return calls[name]


@pytest.fixture
def ieee() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def differentiate(function: Callable[..., Any], tensors: list[Tensor | None], **options: Any) -> list[Tensor]:
    """Results and gradients for fixed random gradients of the results."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    results = function(*leaves, **options)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.device, r.dtype) for r in results]
    return [*results, *torch.autograd.grad(results, [t for t in leaves if t is not None], grads)]


def skip_where_missing(backend: str, device: str) -> None:
    reason = extension.why_not(torch.empty(1, device=device)) if backend == "native" else None
    if reason is not None:
        pytest.skip(reason)


@on_devices
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "tf32", "float32"])  # a cut run saw these first
@pytest.mark.usefixtures("ieee", "poisoned")
def test_against_float64(name: str, precision: str, device: str) -> None:
    """Results and all gradients, at odd sizes, by norm."""
    if device == "cpu" and precision != "float32":
        pytest.skip("on the CPU float32 tries the test; the ops' own tests try the dtypes")
    function, exact, backend = make(name, scale=4 if device == "cuda" else 0)
    skip_where_missing(backend, device)
    dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    tensors = [None if t is None else t.to(device, dtype) for t in exact]
    rounded = [None if t is None else t.double().cpu() for t in tensors]
    want = differentiate(function, rounded, backend="reference")
    got = differentiate(function, tensors, backend=backend)
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
    function, exact, backend = make(name, scale=8 if device == "cuda" else 0)
    skip_where_missing(backend, device)
    tensors = [None if t is None else t.to(device, torch.float32) for t in exact]
    first, second = (differentiate(function, tensors, backend=backend) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@on_devices
@pytest.mark.parametrize("name", CALLS)
def test_for_the_sanitizer(name: str, device: str) -> None:
    """Small and odd, forward and backward: for compute-sanitizer, which selects tests of this name."""
    function, exact, backend = make(name, scale=0)
    skip_where_missing(backend, device)
    dtype = torch.float32 if device == "cpu" else torch.float16
    tensors = [None if t is None else t.to(device, dtype) for t in exact]
    assert all(torch.isfinite(t).all() for t in differentiate(function, tensors, backend=backend))
    with torch.no_grad():
        function(*tensors, backend=backend)


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
