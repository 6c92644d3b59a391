"""The Performer token layer around the attention kernels; what follows the attention is left to the library."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..reference import token_performer as reference
from . import performer_attention


def forward(*args: Any) -> Tensor:
    """(B, T, 3E) to (B, T, E); the arguments of :func:`t2t_fast.reference.token_performer.forward`."""
    return reference.forward(*args, attention=performer_attention.forward)


def can_run(kqv: Tensor, w: Tensor, *rest: Any) -> str | None:
    """None, or why not."""
    k, q, v = kqv.chunk(3, dim=-1)
    return performer_attention.can_run(k, q, v, w, 0.0)


def is_slower(kqv: Tensor, *rest: Any) -> str | None:
    """None, or why ``auto`` passes it over."""
    return performer_attention.is_slower(kqv)
