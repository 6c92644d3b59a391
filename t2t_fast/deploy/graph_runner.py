"""CUDA graphs of a model for fixed batches: one launch in place of hundreds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_count
from ..dispatch import resolve_backend
from ..models.t2t_vit import T2TViT
from ..numerics import ieee_float32
from .freeze import FrozenT2TViT

_WARM_UP = 3  # runs before a capture: libraries choose their algorithms and fetch their workspaces


class GraphRunner(nn.Module):
    """Calls ``model``, by replaying a CUDA graph for every batch size that has one.

    A small batch keeps a GPU busy for less time than it takes to launch its kernels one by one; a graph launches them
    all at once. The graphs are captured here and share one pool of memory. A batch of another size, shape, dtype or
    device, and calls under another autocast, backend or precision of float32 products than the runner was made under,
    call the model as it is, and so does everything on devices other than CUDA: :meth:`reason` tells. Results are
    copies, which later calls leave alone. Weights may be changed in place. Moving or casting the runner lets go of the
    graphs; whoever replaces a weight makes a new runner. Copies and pickles capture anew.

    Args:
        model: For inference, best a frozen one; a module that maps a batch of images to one tensor.
        batch_sizes: Batches to capture.
        example: One image (in_chans, H, W), whose shape and dtype all have; None takes what a T2T-ViT was built for.

    Attributes:
        notes: What was captured, or why nothing was.

    Raises:
        TypeError: No ``example`` for a model that does not tell its own, or arguments of another type.
        ValueError: The model is in training mode, a batch size is below 1, or ``example`` is not one image.
    """

    def __init__(self, model: nn.Module, batch_sizes: Sequence[int] = (1,), example: Tensor | None = None) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(batch_sizes, Iterable):
            raise TypeError(f"batch_sizes must be a sequence of ints, got {batch_sizes!r}")
        self._batch_sizes = tuple(batch_sizes)
        for size in self._batch_sizes:
            check_count("batch_sizes", size, 1)
        if example is not None and example.dim() != 3:
            raise ValueError(f"example must be one image (in_chans, H, W), got the shape {tuple(example.shape)}")
        if any(module.training for module in model.modules()):
            raise ValueError("model is in training mode: graphs are for inference, call model.eval() first")
        self.model = model
        super().train(False)
        self._example = _example_for(model) if example is None else example.detach()
        self._conditions = _conditions(self._example.device)
        self._obstacle = _obstacle(self._example.device)
        sizes = sorted(set(self._batch_sizes), reverse=True)  # the largest first: the others fit into its memory
        self._replays = {} if self._obstacle else _capture(self.model, self._example, sizes)
        self._lock = threading.Lock()
        self.notes = [f"batches of {size}: captured" for size in self._replays]
        if self._obstacle is not None:
            self.notes.append(f"nothing to capture: {self._obstacle}")

    def reason(self, images: Tensor) -> str | None:
        """Why a call with ``images`` runs the model kernel by kernel; None if it replays a graph."""
        if self._obstacle is not None:
            return self._obstacle
        casts = isinstance(self.model, FrozenT2TViT) and images.is_floating_point()
        for name, got, want in (
            ("shape", tuple(images.shape[1:]), tuple(self._example.shape)),
            ("dtype", self._example.dtype if casts else images.dtype, self._example.dtype),
            ("device", images.device, self._example.device),
        ):
            if got != want:
                return f"the images' {name} is {got}, the graphs were captured for {want}"
        if images.shape[0] not in self._replays:
            return f"batches of {images.shape[0]} were not captured, only of {', '.join(map(str, self._replays))}"
        if _conditions(images.device) != self._conditions:
            return "autocast, the backend or the precision of float32 products is another than at the capture"
        if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            return "a compiler, or another capture, is recording"
        return None

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to what the model returns for them, (B, num_classes), without gradients."""
        if self.reason(images) is not None:
            return self.model(images)
        with self._lock:
            return self._replays[images.shape[0]](images)

    def train(self, mode: bool = True) -> GraphRunner:
        """Raises:
        RuntimeError: ``mode`` is true.
        """
        if mode:
            raise RuntimeError("graphs are for inference; train the model itself, and make a new runner")
        return super().train(False)

    def _apply(self, *args: Any, **kwargs: Any) -> GraphRunner:
        if self._replays:  # recorded addresses are about to be given back
            self._replays = {}
            self._obstacle = "the runner was moved or cast after the capture; make a new one"
            self.notes = [f"nothing to replay: {self._obstacle}"]
        return super()._apply(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model, self._batch_sizes, self._example)

    def extra_repr(self) -> str:
        return "\n".join(self.notes)


def _example_for(model: nn.Module) -> Tensor:
    inner = model.model if isinstance(model, FrozenT2TViT) else model
    if not isinstance(inner, T2TViT):
        raise TypeError(f"example must be given for a {type(model).__name__}: one image (in_chans, H, W)")
    like = inner.cls_token
    return torch.zeros(inner.tokens_to_token.in_chans, *inner.img_size, dtype=like.dtype, device=like.device)


def _obstacle(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the model is on {device.type!r}, and graphs are CUDA's; it runs as it is"
    return None


def _conditions(device: torch.device) -> tuple[Any, ...]:
    """What a recorded run depends on besides its input."""
    autocast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else None
    return autocast, dtype, resolve_backend(), ieee_float32()


def _caches(model: nn.Module) -> list[Any]:
    """What the models have computed once and may drop again, for a graph to keep alive: it has recorded addresses."""
    return [dict(module._tables) for module in model.modules() if isinstance(module, T2TViT)]


@torch.inference_mode(False)  # the graphs' inputs are written to in any mode later
@torch.no_grad()
def _capture(model: nn.Module, example: Tensor, sizes: Sequence[int]) -> dict[int, Callable[[Tensor], Tensor]]:
    """For each batch size, a function that replays ``model`` on images like ``example``, and copies the result."""
    autocast, dtype, *_ = _conditions(example.device)
    # Autocast drops its copies of the weights when its region ends; a graph must make its own.
    with torch.autocast(example.device.type, dtype, enabled=autocast, cache_enabled=False):
        torch.clear_autocast_cache()
        return _record_all(model, example, sizes)


def _record_all(model: nn.Module, example: Tensor, sizes: Sequence[int]) -> dict[int, Callable[[Tensor], Tensor]]:
    done = torch.cuda.Event()  # of the previous call, on whatever stream: all graphs use the same memory
    pool: Any = None

    def record(size: int) -> Callable[[Tensor], Tensor]:
        nonlocal pool
        images = example.new_zeros(size, *example.shape)
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                model(images)
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits = model(images)
        pool = graph.pool()
        kept = _caches(model)

        def replay(new: Tensor, kept: Any = kept) -> Tensor:
            with torch.cuda.device(example.device):
                current = torch.cuda.current_stream()
                current.wait_event(done)
                images.copy_(new)
                graph.replay()
                result = logits.clone()
                done.record(current)
            return result

        return replay

    with torch.cuda.device(example.device):
        return {size: record(size) for size in sizes}
