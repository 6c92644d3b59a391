"""ops.soft_split_performer: a whole stage against its two ops in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_close, gradients, skip_unless_possible, widest, with_dtypes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from t2t_fast import ops, use_backend
from t2t_fast.bench import samples
from t2t_fast.bench.samples import Sizes
from t2t_fast.kernels.costs import soft_split_performer
from t2t_fast.kernels.windows import make_view, make_window
from t2t_fast.layers import TokensToToken
from t2t_fast.ops.common.norm import Norm
from t2t_fast.ops.performer import reference, triton_layer
from t2t_fast.ops.performer.arguments import Layer, Options
from t2t_fast.ops.soft_splits.arguments import Geometry, Split

pytestmark = pytest.mark.usefixtures("on_device", "poisoned")

BACKENDS = ("reference", "aten", "triton", "native")
CASES = {
    "image": Sizes(channels=3, grid=(30, 23), geometry=Geometry((7, 7), (4, 4), (2, 2)), features=12, hidden=24),
    "tokens": Sizes(batch=3, channels=20, grid=(5, 7), as_tokens=True, dim=16, features=8, hidden=40),
    "one token": Sizes(channels=5, grid=(4, 3), geometry=Geometry((4, 3), (1, 1), (0, 0)), dim=16, features=9),
    "pairs": Sizes(batch=1, channels=4, grid=(9, 14), geometry=Geometry((3, 2), (2, 3), (0, 1)), dim=33, features=20),
}


def make(case: str, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], dict[str, Any]]:
    """The 14 tensors of a case, and its geometry."""
    sample = samples.make("soft_split_performer", CASES[case], dtype)
    geometry = {name: sample.pop(name) for name in ("kernel_size", "stride", "padding", "grid")}
    return list(sample.values()), geometry


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize(("backend", "dtype"), with_dtypes(BACKENDS))
def test_inference(case: str, backend: str, dtype: torch.dtype) -> None:
    skip_unless_possible(backend, dtype)
    tensors, geometry = make(case, dtype)
    want = ops.soft_split_performer(*(t.double() for t in tensors), **geometry, backend="reference")
    kqv = ops.soft_split_linear(*(t.double() for t in tensors[:5]), **geometry, backend="reference")
    assert torch.equal(want, ops.token_performer(kqv, *(t.double() for t in tensors[5:]), backend="reference"))
    got = ops.soft_split_performer(*tensors, **geometry, backend=backend)
    assert got.dtype == dtype
    assert_close(got, want, dtype, tensors[1].shape[1] + want.shape[1])


@pytest.mark.parametrize("case", ["image", "tokens"])
@pytest.mark.parametrize(("backend", "dtype"), with_dtypes(BACKENDS))
def test_folded(case: str, backend: str, dtype: torch.dtype) -> None:
    """Both LayerNorms in the weights behind them, as in a frozen model."""
    skip_unless_possible(backend, dtype)
    tensors, geometry = make(case)
    want = ops.soft_split_performer(*tensors, **geometry, backend="reference")
    folded: list[Any] = list(tensors)
    for weight, gamma in ((1, 3), (10, 8)):  # and the places of the bias and of beta behind them
        folded[weight + 1] = tensors[weight + 1] + tensors[weight] @ tensors[gamma + 1]
        folded[weight] = tensors[weight] * tensors[gamma]
        folded[gamma] = folded[gamma + 1] = None
    folded[1] -= folded[1].mean(1, keepdim=True)
    folded = [None if t is None else t.to(dtype) for t in folded]
    with torch.no_grad():
        got = ops.soft_split_performer(*folded, **geometry, folded=True, backend=backend)
    assert got.dtype == dtype
    assert_close(got, want, dtype, tensors[1].shape[1] + want.shape[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["image", "tokens"])
def test_gradients(case: str, backend: str) -> None:
    dtype = widest(backend)
    skip_unless_possible(backend, dtype)
    tensors, geometry = make(case, dtype)
    exact = [t.double() for t in tensors]
    w, exact_w = tensors.pop(5), exact.pop(5)

    def function(w: Tensor, backend: str) -> Any:
        return lambda *t: ops.soft_split_performer(*t[:5], w, *t[5:], **geometry, backend=backend)

    literal = function(exact_w, "reference")
    grad = torch.randn_like(literal(*exact)).to(dtype)
    wanted = gradients(literal, exact, grad.double())
    for found, want in zip(gradients(function(w, backend), tensors, grad), wanted, strict=True):
        assert_close(found, want, dtype, 4000, grad=True)


class Operators(TorchDispatchMode):
    """Notes the names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def operators_in(function: Any) -> set[str]:
    """The project's operators that ``function`` calls. (torch's counters hook every module.)"""
    with Operators() as operators:
        function()
    return {name.removeprefix("t2t_fast::") for name in operators.names if name.startswith("t2t_fast::")}


def test_flops_are_those_of_the_two_ops() -> None:
    tensors, geometry = make("image", torch.float32)
    counts = []
    for backend in ("triton", "reference"):
        with FlopCounterMode(display=False) as counter:
            ops.soft_split_performer(*tensors, **geometry, backend=backend)
        counts.append(counter.get_total_flops())
    assert abs(counts[0] / counts[1] - 1) < 0.01
    window = make_window(3, (7, 7), (4, 4), (2, 2), False)
    cost = soft_split_performer(2, window, make_view(tensors[0], window), 24, 12, 24, 4)["forward"]
    assert abs(cost.flops / counts[0] - 1) < 0.01
    read_once = sum(t.numel() for t in (tensors[0], *(t for t in tensors if t.ndim == 2))) - tensors[5].numel()
    assert cost.bytes == 4 * (read_once + 2 * 42 * 24)


def test_flat_and_bright_patches_keep_their_digits() -> None:
    tensors, geometry = make("image", torch.float32)
    tensors[0] = 1000 + 1e-3 * torch.randn(tensors[0].shape)
    tensors[0][0] = 255.0
    want = ops.soft_split_performer(*(t.double() for t in tensors), **geometry, backend="reference")
    got = ops.soft_split_performer(*tensors, **geometry, backend="triton")
    # What the image's own float32 rounding leaves of a deviation of 1e-3 around 1000.
    assert (got - want).norm() <= 1e-3 * want.norm()
    inner = want[0].unflatten(0, (7, 6))[1:-1, 1:-1].flatten(0, 1)
    assert_close(got[0].unflatten(0, (7, 6))[1:-1, 1:-1].flatten(0, 1), inner, torch.float32, 200)


def test_kernels_need_no_tensor_larger_than_keys_queries_and_values() -> None:
    """The long tokens of the soft split are three times as large."""
    tensors, geometry = make("image", torch.float32)
    tensors[0] = torch.randn(2, 3, 64, 64)
    with torch.profiler.profile(profile_memory=True) as profile:
        out = ops.soft_split_performer(*tensors, **geometry, backend="triton")
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert max(event.nbytes() for event in events) == 3 * out.numel() * out.itemsize


def test_bad_input_is_named() -> None:
    tensors, geometry = make("image")
    for index, message in (
        (1, r"kqv_weight must have shape \(out, C\*kh\*kw\) = \(71, 147\), got \(71, 146\)"),
        (3, r"norm1_weight must have shape \(C\*kh\*kw,\) = \(147,\), got \(146,\)"),
        (8, r"norm2_weight must have shape \(E,\) = \(24,\), got \(23,\)"),
    ):
        wrong = [t[1:, ..., 1:] if i == index == 1 else t[1:] if i == index else t for i, t in enumerate(tensors)]
        with pytest.raises(ValueError, match=message):
            ops.soft_split_performer(*wrong, **geometry)
    wrong = [t[1:] if i in (1, 2) else t for i, t in enumerate(tensors)]
    with pytest.raises(ValueError, match=r"kqv_weight .*3E rows, got 71"):
        ops.soft_split_performer(*wrong, **geometry)
    with pytest.raises(ValueError, match=r"proj_drop must be in \[0, 1\), got 1\.5"):
        ops.soft_split_performer(*tensors, **geometry, proj_drop=1.5)
    with pytest.raises(ValueError, match="folded=True says that kqv_weight holds norm1_weight already"):
        ops.soft_split_performer(*tensors, **geometry, folded=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("training", [False, True])
def test_the_whole_module_in_triton(training: bool, dtype: torch.dtype) -> None:
    """Tokens-to-token from image to backbone tokens: every stage in Triton, values and all gradients."""
    module = TokensToToken(embed_dim=48, token_dim=32, drop_rate=0.0).to(torch.empty(0).device)
    exact = TokensToToken(embed_dim=48, token_dim=32, drop_rate=0.0, backend="reference").double()
    exact = exact.to(torch.empty(0).device)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    exact.load_state_dict(module.state_dict())
    module = module.to(dtype)
    images = torch.randn(2, 3, 29, 20, dtype=dtype, requires_grad=training)
    module.train(training)
    with torch.set_grad_enabled(training):
        with use_backend("triton"):
            called = operators_in(lambda: module(images))
            got = module(images)
        wide = images.detach().double().requires_grad_(training)
        want = exact(wide)
    assert called == {"soft_split_linear", "token_performer"}
    assert_close(got, want, dtype, 1000)
    if training:
        grad = torch.randn_like(want)
        learned = [p for p in module.parameters() if p.requires_grad]
        found = torch.autograd.grad(got, [images, *learned], grad.to(dtype))
        wanted = torch.autograd.grad(want, [wide, *(p for p in exact.parameters() if p.requires_grad)], grad)
        for f, w in zip(found, wanted, strict=True):
            assert_close(f, w, dtype, 20000, grad=True)


def test_reference_is_the_composition() -> None:
    tensors, _ = make("image")
    x, weight, bias, gamma, beta, *layer = tensors
    split = Split(Geometry((7, 7), (4, 4), (2, 2)), None, Norm(gamma, beta, 1e-5))
    args = (x, weight, bias, split, Layer(*layer), Options(0.0, 0.0, 1e-8, 1e-5))
    assert triton_layer.why_not_soft_split_performer(*args) is None or not torch.cuda.is_available()
    want = reference.soft_split_performer(*args)
    assert_close(triton_layer.soft_split_performer(*args), want, torch.float64, 200)


def test_the_module_keeps_little_for_backward() -> None:
    """Of both stages the input of the layer, and small sums; weights aside."""
    module = TokensToToken(embed_dim=32, token_dim=64).to(torch.empty(0).device)
    images, kept = torch.randn(4, 3, 96, 96), {}
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    for backend in ("reference", "triton"):
        sizes: dict[int, int] = {}

        def pack(t: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            if t.untyped_storage().data_ptr() not in weights:
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with (
            use_backend(backend),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
            torch.autocast(images.device.type, dtype=torch.float16),
        ):
            out = module(images)
        kept[backend] = sum(sizes.values())
        del out
    assert kept["triton"] < 0.25 * kept["reference"]
