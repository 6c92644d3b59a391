"""When the hand-written backward of an ``aten`` implementation is taken instead of autograd's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...numerics import no_autocast


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of one of them."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def wants_hand_written_backward(*tensors: Tensor | None) -> bool:
    """Whether gradients will be taken eagerly: compilers and tracers differentiate the plain operations themselves."""
    return wants_gradient(*tensors) and not torch.compiler.is_compiling() and not is_transformed()


def may_overwrite(*factors: Tensor) -> bool:
    """Whether a fresh result may be multiplied by ``factors`` in place: their gradients need its old value."""
    return not any(t.requires_grad for t in factors) and (torch.compiler.is_compiling() or not is_transformed())


def add_to(fresh: Tensor, other: Tensor) -> Tensor:
    """``fresh + other``, in the memory of ``fresh``, of which autograd needs nothing; but not where others watch."""
    return fresh.add_(other) if may_overwrite() else fresh + other


def is_transformed() -> bool:
    """Whether a tracer, torch.func or forward-mode differentiation watches: they need plain operations."""
    return torch.jit.is_tracing() or torch._C._are_functorch_transforms_active() or forward_mode()


def runs_eagerly(x: Any) -> bool:
    """Whether ``x`` is a Tensor of no subclass, outside compilation, tracing, torch.func and dispatch modes.

    Also outside autocast on the CPU; on other devices, library operations heed autocast themselves.
    """
    return not (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or is_transformed()
        or torch._C._len_torch_dispatch_stack() > 0
        or (x.device.type == "cpu" and torch.is_autocast_enabled("cpu"))
    )


def in_dispatch_mode() -> bool:
    """Whether a ``TorchDispatchMode`` sees every operation: counters of FLOPs, for one, know the library's alone."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Whether ``torch.export`` watches: its program must run without this package, so on library operations."""
    return torch.compiler.is_exporting()


def forward_mode() -> bool:
    """Whether forward-mode derivatives are being taken (``torch.func.jvp``, ``torch.autograd.forward_ad``)."""
    return torch.autograd.forward_ad._current_level >= 0


def backward_by_hand(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Decorates a ``Function.backward`` whose first output alone is differentiable.

    No gradient gives none; otherwise it runs in the dtypes of its forward, even if called inside an autocast region.
    """

    @functools.wraps(backward)
    def run(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        with no_autocast(grad):
            return backward(ctx, grad)

    return run


def differentiable_backward(
    forward: Callable[..., Tensor], inputs: tuple[Any, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Autograd's own gradients of ``forward(*inputs)``, themselves differentiable: for second derivatives.

    A backward takes them where gradients are enabled in it, which is what ``create_graph=True`` does.
    """
    # Views: one input may be another, or be computed from it, and each shall get its own part of the gradient.
    views = tuple(t.view_as(t) if isinstance(t, Tensor) and t.requires_grad else t for t in inputs)
    wanted = [t for t in views if isinstance(t, Tensor) and t.requires_grad]
    with no_autocast(grad):
        y = forward(*views)
        found = iter(torch.autograd.grad(y, wanted, grad.to(y.dtype), create_graph=True))
    return tuple(next(found) if isinstance(t, Tensor) and t.requires_grad else None for t in inputs)
