"""CUDA graphs of a model for fixed batch sizes: one launch instead of hundreds."""

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

_WARM_UP = 3  # runs before a capture, in which libraries choose algorithms and allocate workspaces


class GraphRunner(nn.Module):
    """Runs ``model`` by replaying a CUDA graph, for the batch sizes that have one.

    Launching the kernels of a small batch one by one takes a GPU longer than computing them; a graph launches all at
    once. The graphs are captured by the constructor and share one memory pool. These calls run the model itself:
    batches of another size, shape, dtype or device; another autocast, backend or precision of float32 matmuls than at
    the capture; any device but CUDA. :meth:`reason` says which. Results are copies that later calls do not overwrite.
    Weights may be changed in place; after replacing one, make a new runner. Moving or casting the runner drops the
    graphs. Copies and pickles capture again.

    Args:
        model: A module in evaluation mode that maps a batch of images to one tensor, best a frozen model.
        batch_sizes: Batch sizes to capture.
        example: One image (in_chans, H, W) with the shape and dtype of all images; None takes those that a T2T-ViT was
            built for.

    Attributes:
        notes: What was captured, or why nothing was.

    Raises:
        TypeError: ``example`` is missing for a model other than a T2T-ViT, or an argument has a wrong type.
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
        self._why_not = _why_not(self._example.device)
        sizes = sorted(set(self._batch_sizes), reverse=True)  # the largest first: the others reuse its memory
        self._replays = {} if self._why_not else _capture(self.model, self._example, sizes)
        self._lock = threading.Lock()
        self.notes = [f"batches of {size}: captured" for size in self._replays]
        if self._why_not is not None:
            self.notes.append(f"nothing to capture: {self._why_not}")

    def reason(self, images: Tensor) -> str | None:
        """Why a call with ``images`` would run the model itself; None if it would replay a graph."""
        if self._why_not is not None:
            return self._why_not
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
            return "autocast, the backend or the precision of float32 matmuls is another than at the capture"
        if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            return "a compiler or another capture is recording"
        return None

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the model's logits (B, num_classes), without gradients."""
        if self.reason(images) is not None:
            return self.model(images)
        with self._lock:
            return self._replays[images.shape[0]](images)

    def train(self, mode: bool = True) -> GraphRunner:
        """Stay in evaluation mode.

        Raises:
            RuntimeError: ``mode`` is true.
        """
        if mode:
            raise RuntimeError("graphs are for inference; train the model itself, and make a new runner")
        return super().train(False)

    def _apply(self, *args: Any, **kwargs: Any) -> GraphRunner:
        if self._replays:  # the graphs hold addresses that are about to be freed
            self._replays = {}
            self._why_not = "the runner was moved or cast after the capture; make a new one"
            self.notes = [f"nothing to replay: {self._why_not}"]
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


def _why_not(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the model is on {device.type!r}, and graphs are CUDA's; the model itself runs"
    return None


def _conditions(device: torch.device) -> tuple[Any, ...]:
    """The settings that a recorded run depends on."""
    autocast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else None
    return autocast, dtype, resolve_backend(), ieee_float32()


def _caches(model: nn.Module) -> list[Any]:
    """The models' cached position tables. A graph holds their addresses, so it must keep them alive."""
    return [dict(module._tables) for module in model.modules() if isinstance(module, T2TViT)]


@torch.inference_mode(False)  # the graphs' inputs will be written to outside of inference mode
@torch.no_grad()
def _capture(model: nn.Module, example: Tensor, sizes: Sequence[int]) -> dict[int, Callable[[Tensor], Tensor]]:
    """For each batch size, a function that replays ``model`` on images like ``example``, and copies the result."""
    autocast, dtype, *_ = _conditions(example.device)
    # Autocast frees its cached casts of weights when its context ends; a graph must cast for itself.
    with torch.autocast(example.device.type, dtype, enabled=autocast, cache_enabled=False):
        torch.clear_autocast_cache()
        return _record_all(model, example, sizes)


def _record_all(model: nn.Module, example: Tensor, sizes: Sequence[int]) -> dict[int, Callable[[Tensor], Tensor]]:
    done = torch.cuda.Event()  # end of the previous call, on any stream: all graphs share their memory
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
