"""The Performer token layer around the attention kernels; what follows the attention is left to the library."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from ..reference import token_performer as reference
from . import performer_attention

forward = partial(reference.forward, attention=performer_attention.forward)


def can_run(kqv: Tensor, w: Tensor, *rest: Any) -> str | None:
    """None, or why not."""
    k, q, v = kqv.chunk(3, dim=-1)
    return performer_attention.can_run(k, q, v, w, 0.0)


def is_slower(kqv: Tensor, *rest: Any) -> str | None:
    """None, or why ``auto`` passes it over."""
    return performer_attention.is_slower(kqv)
