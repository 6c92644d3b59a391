"""Count a model's multiply-accumulates, including the matmuls inside attention."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from .checks import as_pair
from .dispatch import use_backend
from .models import T2TViT
from .models.variants import VARIANTS


@dataclass(frozen=True)
class Macs:
    """The cost of one image.

    Attributes:
        params: Number of parameters, including fixed ones.
        macs: Multiply-accumulates of a forward pass, every module computed in full.
        activations: Number of values that matmuls and convolutions write.
        by_module: Module name to the multiply-accumulates spent in it and its children.
        executed: Multiply-accumulates that a call runs: a T2T-ViT's last block may run for the cls token alone.
    """

    params: int
    macs: int
    activations: int = 0
    by_module: dict[str, int] = field(default_factory=dict, repr=False)
    executed: int = 0


def count_macs(model: nn.Module, image_size: int | Sequence[int] | None = None, in_chans: int | None = None) -> Macs:
    """Count the multiply-accumulates of ``model`` for one image, in evaluation mode.

    Every matmul and convolution counts, also the two matmuls of attention, which counters of module calls miss. Norms,
    softmax, exponentials and activation functions do not count, as usual in the literature. A T2T-ViT is counted by its
    definition, whatever its backend. Nothing is computed and the model is not changed: a copy without values runs on
    shapes alone, so the model may be on the meta device.

    Args:
        model: Any image model, also of timm or torchvision.
        image_size: Height and width in pixels, an int or a pair; None takes the model's own.
        in_chans: Channels of the image; None takes the model's own.

    Raises:
        ValueError: The model does not know its image size, and ``image_size`` is None.
    """
    model = getattr(model, "_orig_mod", model)  # inside torch.compile
    own_size = own_image_size(model)
    size = own_size if image_size is None else as_pair("image_size", image_size, 1)
    if size is None:
        raise ValueError(f"image_size=None, but a {type(model).__name__} does not tell its own; pass (height, width)")
    channels = own_in_chans(model) if in_chans is None else in_chans
    # In every version of torch the counter knows the matmuls of plain attention, but not every fused form.
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
        use_backend("reference"),
        sdpa_kernel(SDPBackend.MATH),
        _without_mha_fastpath(),
    ):
        twin: Any = _weightless_copy(model).eval()
        if size != own_size and hasattr(twin, "set_input_size"):
            twin.set_input_size(size)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        image = torch.empty(1, channels, *size, dtype=dtype, device="cpu")
        with FlopCounterMode(display=False) as counter, _ActivationCounter(counter) as activations:
            twin(image)  # the counter hooks all modules, so all of them are called and for all tokens
        with _Executed(counter) as executed:
            twin(image)
    root = type(twin).__name__ + "."
    by_module = {
        name.removeprefix(root): sum(flops.values()) // 2
        for name, flops in counter.get_flop_counts().items()
        if name.startswith(root)
    }
    params = sum(p.numel() for p in model.parameters())
    return Macs(params, counter.get_total_flops() // 2, activations.count, by_module, executed.count // 2)


# The paper's only figure at another size than 224 px: Table 2, T2T-ViT-14 at 384 px.
_PUBLISHED_384 = {"t2t_vit_14": (21.5, 17.1)}


def published(name: str, size: tuple[int, int]) -> tuple[float | None, float | None]:
    """The paper's millions of parameters and billions of MACs for a model at an image size; None where unpublished."""
    architecture = name.partition(".")[0]
    variant = VARIANTS.get(architecture)
    if size == (224, 224) and variant is not None and variant.published is not None:
        return variant.published.params_m, variant.published.macs_g
    return _PUBLISHED_384.get(architecture, (None, None)) if size == (384, 384) else (None, None)


class _Counter(TorchDispatchMode):
    """Counts something of every operation that ``flops`` counts."""

    def __init__(self, flops: FlopCounterMode) -> None:
        super().__init__()
        self.registry, self.count = flops.flop_registry, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._overloadpacket in self.registry:
            self.count += self.count_of(func, args, kwargs, out)
        return out

    def count_of(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> int:
        raise NotImplementedError


class _ActivationCounter(_Counter):
    """The values that are returned."""

    def count_of(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> int:
        return sum(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor))


class _Executed(_Counter):
    """Floating-point operations, without the hooks of ``flops`` itself."""

    def count_of(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> int:
        return int(self.registry[func._overloadpacket](*args, **kwargs, out_val=out))


def own_image_size(model: nn.Module) -> tuple[int, int] | None:
    """The (height, width) that the model was built for: its ``img_size``, or that of its timm configuration."""
    for owner in (model, getattr(model, "patch_embed", None)):
        size = getattr(owner, "img_size", None)
        if size is not None:
            return as_pair("img_size", size, 1)
    config = getattr(model, "pretrained_cfg", None) or {}
    return tuple(config["input_size"][1:]) if config.get("input_size") else None


def own_in_chans(model: nn.Module) -> int:
    """The image channels that ``model`` takes."""
    for module in model.modules():
        if isinstance(module, T2TViT):
            return module.tokens_to_token.in_chans
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return 3


def _weightless_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU whose tensors have shapes but no values; for use inside a FakeTensorMode."""

    def weightless(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")

    memo: dict[int, Any] = {id(p): nn.Parameter(weightless(p), requires_grad=False) for p in model.parameters()}
    memo.update((id(b), weightless(b)) for b in model.buffers())
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        if isinstance(module, T2TViT):
            module.set_backend("auto")  # a backend of its own would overrule use_backend
    return twin


@contextlib.contextmanager
def _without_mha_fastpath() -> Iterator[None]:
    """Keep ``nn.MultiheadAttention`` off its fused inference path, which counts as nothing."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
