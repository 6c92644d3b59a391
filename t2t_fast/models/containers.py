"""Find the weights in a trainer's file: nested dictionaries (containers), prefixes of names, averaged copies."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from .layouts import CheckpointError, find_prefixes, names_under, some
from .pickles import StandIn
from .weight_files import GRID_KEY

# Known containers and prefixes by preference. Others are searched too, and taken if there is exactly one.
_KNOWN = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "model_state", "module", "")
_KNOWN_PREFIXES = ("", "module.", "model.", "backbone.")
_AVERAGED = re.compile(r"(?i:(^|[._])(ema|averaged?|avg|swa)([._]|$))|EMA")
# mmengine and Lightning swap weights before they save: `state_dict` gets the averaged ones, the key here the trained
# ones. The value is an entry by which the trainer is recognised.
_SWAPPED = {"ema_state_dict": "message_hub", "current_model_state": "pytorch-lightning_version"}
_MAX_DEPTH = 4
_MAX_DICTIONARIES = 1000


@dataclass(frozen=True)
class FoundWeights:
    """The weights of one model in a file.

    Attributes:
        entries: The whole container: names as in the file to values, most of them tensors.
        tensors: The tensors and NumPy arrays among ``entries``.
        names: The names in the file that belong to the model, to the same names without the prefix.
        source: The container's key; ``"bare"`` for the file itself.
        notes: What a user should know about the choice of the container.
        ignored: Texts about entries of the container that do not belong to the model.
        grid: Height and width of the position table's grid, in tokens, if the file records them.
    """

    entries: Mapping[Any, Any]
    tensors: dict[str, Tensor | np.ndarray]
    names: dict[str, str]
    source: str
    notes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class _Candidate:
    path: tuple[str, ...]
    prefix: str
    entries: Mapping[Any, Any]
    averaged: bool

    @property
    def source(self) -> str:
        return ".".join(self.path) or "bare"

    @property
    def rank(self) -> int:
        """Position among the known containers; unknown ones share the last position."""
        container = self.path[-1] if self.path else ""
        known = container in _KNOWN and len(self.path) < 2 and self.prefix in _KNOWN_PREFIXES
        return _KNOWN.index(container) if known else len(_KNOWN)

    def __str__(self) -> str:
        return some([f"{self.source} under {self.prefix}" if self.prefix else self.source])


def find_weights(content: Mapping[Any, Any], use_ema: bool, grid: Any = None) -> FoundWeights:
    """Find the weights of a T2T-ViT in the content of a file.

    Args:
        content: Names to tensors, or a trainer's dictionary around them, nested or not.
        use_ema: Prefer averaged weights if there are both.
        grid: The position table's grid as the file records it, unchecked.

    Returns:
        The weights. If no T2T-ViT is found, the likeliest container with all its names, for an error message.

    Raises:
        CheckpointError: There are several models, and no way to tell which one is meant.
    """
    candidates = list(_search(content, (), iter(range(_MAX_DICTIONARIES))))
    if not candidates:
        return _likeliest_container(content)
    candidates.sort(key=lambda c: (c.averaged != use_ema, c.rank))
    chosen, *others = candidates
    rivals = [c for c in others if (c.averaged, c.rank) == (chosen.averaged, chosen.rank)]
    if rivals:
        raise CheckpointError(
            f"holds several models: {', '.join(map(str, [chosen, *rivals]))}; save the state dict of the one you want"
        )
    notes = []
    if others:
        notes.append(f"took the weights in {chosen}, left those in {', '.join(map(str, others))}")
    elif chosen.averaged and not use_ema:
        notes.append(f"took the averaged weights in {chosen}: the file has no others")
    tensors, rest = _tensors_of(chosen.entries)
    names = names_under(chosen.prefix, tensors)
    if chosen.prefix == "":  # a second model, under a prefix, may be in the same container
        for other in find_prefixes(tensors):
            if other:
                names = {name: bare for name, bare in names.items() if not bare.startswith(other)}
    ignored = []
    if rest:
        ignored.append(f"ignored what is not a tensor: {some(rest)}")
    beside = [name for name in tensors if name not in names]
    if beside:
        ignored.append(f"ignored what is not the model's: {some(beside)}")
    recorded = recorded_grid(chosen.entries, chosen.prefix) or as_grid(grid)
    return FoundWeights(chosen.entries, tensors, names, chosen.source, tuple(notes), tuple(ignored), recorded)


def recorded_grid(state_dict: Mapping[Any, Any], prefix: str = "") -> tuple[int, int] | None:
    """The grid in the metadata of a ``T2TViT.state_dict()``; None without one."""
    metadata = getattr(state_dict, "_metadata", None)
    own = metadata.get(prefix.removesuffix(".")) if isinstance(metadata, Mapping) else None
    return as_grid(own.get(GRID_KEY)) if isinstance(own, Mapping) else None


def as_grid(value: Any) -> tuple[int, int] | None:
    """``value`` if it is a pair of positive ints, else None."""
    if isinstance(value, tuple | list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value):
        return value[0], value[1]
    return None


def _search(entries: Mapping[Any, Any], path: tuple[str, ...], budget: Iterator[int]) -> Iterator[_Candidate]:
    """Every container and prefix with a T2T-ViT's names, in ``entries`` and the dictionaries nested in it."""
    if next(budget, None) is None:  # dictionaries may contain each other
        return
    tensors, _ = _tensors_of(entries)
    for prefix in find_prefixes(tensors):
        around = prefix.removesuffix("backbone.").removesuffix("module.")
        averaged = bool(_AVERAGED.search(".".join((*path, prefix)))) or f"{around}n_averaged" in entries
        yield _Candidate(path, prefix, entries, averaged)
    if len(path) == _MAX_DEPTH:
        return
    trained = [name for name, mark in _SWAPPED.items() if mark in entries and isinstance(entries.get(name), Mapping)]
    for key, value in entries.items():
        if isinstance(key, str) and isinstance(value, Mapping):
            for found in _search(value, (*path, key), budget):
                averaged = bool(trained) if key == "state_dict" and trained else found.averaged and key not in trained
                yield replace(found, averaged=averaged)


def _likeliest_container(content: Mapping[Any, Any]) -> FoundWeights:
    present = [key for key in _KNOWN if isinstance(content.get(key), Mapping) and content[key]]
    source = present[0] if present else ""
    entries = content[source] if source else content
    tensors, _ = _tensors_of(entries)
    unread = [f"{key} is a {type(value).__name__}" for key, value in entries.items() if isinstance(value, StandIn)]
    ignored = (f"{some(unread, 2)}, which is not read",) if unread else ()
    return FoundWeights(entries, tensors, {name: name for name in tensors}, source or "bare", ignored=ignored)


def _tensors_of(entries: Mapping[Any, Any]) -> tuple[dict[str, Tensor | np.ndarray], list[str]]:
    """The tensors, detached, and the keys of everything else."""
    tensors: dict[str, Tensor | np.ndarray] = {}
    ignored = []
    for key, value in entries.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            tensors[key] = value.detach()
        elif isinstance(key, str) and isinstance(value, np.ndarray):
            tensors[key] = value
        else:
            ignored.append(str(key))
    return tensors, ignored
