"""What a module is made of, remembered: whether it still is costs a few dictionary comparisons."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from typing import Any

from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_version = operator.attrgetter("_version")


class Parts:
    """The modules below ``root``, their hooks and their weights, as they are now.

    Args:
        root: The module. Hooks of its own do not count: they see what they want to see in any case.
        settings: (module, name) of plain attributes that count.
        copied: The weights whose values count, not only their places.
    """

    def __init__(self, root: nn.Module, settings: Sequence[tuple[Any, str]], copied: Sequence[Tensor]) -> None:
        self.root = root
        modules = list(root.modules())
        below = modules[1:]
        self._children = [module._modules for module in modules]
        self._known_children = [dict(children) for children in self._children]
        self._below = below
        self._kinds = [*map(type, below)]
        self._hooks = [getattr(module, kind) for module in below for kind in _HOOKS]
        self._attributes = [vars(module) for module in below]
        self._settings = [vars(module) for module, _ in settings], [name for _, name in settings]
        self._known_settings = [*map(dict.get, *self._settings)]
        self._weights = [weights for module in modules for weights in (module._parameters, module._buffers)]
        self._known_weights = [*self._read_weights()]  # kept alive, so that no other tensor gets an id of theirs
        self._ids = [*map(id, self._known_weights)]
        self._tensors = [weight for weight in self._known_weights if weight is not None]
        self._places = [*map(Tensor.data_ptr, self._tensors)]
        self._copied = copied
        self._versions = [*map(_version, copied)]

    def unchanged(self) -> bool:
        """Whether no part was replaced, hooked or patched, and no weight exchanged, moved, cast or (if copied) written.

        Writing to a weight's ``.data`` or memory is not seen: torch does not count it.
        """
        return (
            not any(self._hooks)
            and not any(map(dict.__contains__, self._attributes, repeat("forward")))
            and [*map(type, self._below)] == self._kinds
            and all(map(operator.eq, self._children, self._known_children))
            and [*map(dict.get, *self._settings)] == self._known_settings
            and [*map(id, self._read_weights())] == self._ids
            and [*map(Tensor.data_ptr, self._tensors)] == self._places
            and [*map(_version, self._copied)] == self._versions
        )

    def _read_weights(self) -> Iterator[Tensor | None]:
        return chain.from_iterable(map(dict.values, self._weights))
