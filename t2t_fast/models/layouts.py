"""State-dict layouts of T2T-ViT, and translation between them.

Three projects publish weights of this model, each with its own parameter names:

============  =======================================  ===================================  =====================
layout        token layers                             blocks                               head
============  =======================================  ===================================  =====================
official      ``tokens_to_token.attention1.norm1``     ``blocks.0.mlp.fc1``                 ``head``
mmpretrain    ``backbone.tokens_to_token``             ``backbone.encoder.0``               ``head.layers.head``
              ``.attention1.ln1``                      ``.ffn.layers.0.0``
paddlevit     ``patch_embed.attn1.norm1``              ``blocks.0.mlp.fc1``                 ``head``
============  =======================================  ===================================  =====================

PaddlePaddle stores the weight of a Linear as (in, out), so PaddleViT's matrices are transposed.
Neither mmpretrain nor PaddleViT has the SE, ghost, dense or convolution-token designs; mmpretrain also lacks the
Performer.

Reading is lenient: unknown names pass unchanged, and ``load_state_dict`` reports them. Writing is strict: a name that
the target layout cannot express raises :class:`LayoutError`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

LAYOUTS: tuple[str, ...] = ("official", "mmpretrain", "paddlevit")

# Wrappers of whole models prefix every name; wrappers of single modules (compiled, sharded, ...) add a part inside.
_WRAPPERS = ("module.", "model.", "backbone.")
_INNER_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")

_ANCHOR = "cls_token"
_TOKEN_MODULES = ("tokens_to_token.", "patch_embed.attn1.")

_READ: dict[str, tuple[tuple[re.Pattern[str], str], ...]] = {
    "official": (),
    "mmpretrain": (
        (re.compile(r"^encoder\.(\d+)\."), r"blocks.\1."),
        (re.compile(r"\.ln([12])\."), r".norm\1."),
        (re.compile(r"\.ffn\.layers\.0\.0\."), ".mlp.fc1."),
        (re.compile(r"\.ffn\.layers\.1\."), ".mlp.fc2."),
        (re.compile(r"^head\.layers\.head\."), "head."),
    ),
    "paddlevit": (
        (re.compile(r"^patch_embed\.attn([12])\."), r"tokens_to_token.attention\1."),
        (re.compile(r"^patch_embed\.proj\."), "tokens_to_token.project."),
    ),
}

_WRITE: dict[str, tuple[tuple[re.Pattern[str], str], ...]] = {
    "official": (),
    "mmpretrain": (
        (re.compile(r"^head\."), "head.layers.head."),
        (re.compile(r"^blocks\.(\d+)\."), r"encoder.\1."),
        (re.compile(r"\.norm([12])\."), r".ln\1."),
        (re.compile(r"\.mlp\.fc1\."), ".ffn.layers.0.0."),
        (re.compile(r"\.mlp\.fc2\."), ".ffn.layers.1."),
        (re.compile(r"^(?!head\.)"), "backbone."),
    ),
    "paddlevit": (
        (re.compile(r"^tokens_to_token\.attention([12])\."), r"patch_embed.attn\1."),
        (re.compile(r"^tokens_to_token\.project\."), "patch_embed.proj."),
    ),
}

_TRANSFORMER_NAMES = (
    r"cls_token|pos_embed|(norm|head|tokens_to_token\.project)\.(weight|bias)"
    r"|(tokens_to_token\.attention[12]|blocks\.\d+)\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)"
)
_PERFORMER_NAMES = r"tokens_to_token\.attention[12]\.(w|(norm[12]|kqv|proj|mlp\.[02])\.(weight|bias))"

# The official names that a layout can express, and the designs that its project implements, for the error message.
_REPRESENTABLE: dict[str, tuple[re.Pattern[str], str]] = {
    "mmpretrain": (re.compile(_TRANSFORMER_NAMES), "transformer tokens and standard blocks only"),
    "paddlevit": (
        re.compile(f"{_TRANSFORMER_NAMES}|{_PERFORMER_NAMES}"),
        "performer or transformer tokens and standard blocks only",
    ),
}

_MARKS: dict[str, re.Pattern[str]] = {
    "mmpretrain": re.compile(
        r"encoder\.\d+\.(ln[12]|attn|ffn)\.|tokens_to_token\.attention[12]\.(ln[12]|ffn)\.|head\.layers\.head\."
    ),
    "paddlevit": re.compile(r"patch_embed\.attn[12]\."),
}


class CheckpointError(ValueError):
    """A file or a state dict does not hold the weights asked for."""


class LayoutError(CheckpointError):
    """A layout cannot express a name or a whole model."""


def some(names: Sequence[str], count: int = 4) -> str:
    """The first ``count`` names in one line, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    shown = [name if name.isprintable() else ascii(name) for name in (name[:200] for name in names[:count])]
    return ", ".join(shown) + more if names else "nothing"


def detect_layout(names: Iterable[str]) -> str:
    """Tell the layout of a state dict from its parameter names.

    Args:
        names: Parameter names, with or without wrapper prefixes such as ``module.``.

    Returns:
        ``"mmpretrain"`` or ``"paddlevit"`` if a name occurs in that layout alone, else ``"official"``. The names need
        not belong to a T2T-ViT.
    """
    bare = [_strip(name) for name in names]
    for layout, mark in _MARKS.items():
        if any(mark.match(name) for name in bare):
            return layout
    return "official"


def official_name(name: str, layout: str) -> str:
    """The official name of the parameter that ``layout`` calls ``name``.

    Wrapper prefixes (``module.``, ``_orig_mod.``, ``model.``, ``backbone.``, ...) are removed. Unknown names pass
    unchanged.

    Raises:
        LayoutError: ``layout`` is not one of :data:`LAYOUTS`.
    """
    _check_layout(layout)
    return _translate(_strip(name), layout)


def _translate(name: str, layout: str) -> str:
    for pattern, replacement in _READ[layout]:
        name = pattern.sub(replacement, name)
    return name


def foreign_name(name: str, layout: str) -> str:
    """The name in ``layout`` of the parameter with the official name ``name``.

    Raises:
        LayoutError: ``layout`` is not one of :data:`LAYOUTS`, or cannot express such a parameter.
    """
    _check_layout(layout)
    if layout in _REPRESENTABLE:
        pattern, implements = _REPRESENTABLE[layout]
        if not pattern.fullmatch(name):
            raise LayoutError(f"name={name!r} has no place in layout={layout!r}: {layout} has {implements}")
    for pattern, replacement in _WRITE[layout]:
        name = pattern.sub(replacement, name)
    return name


def to_official(state_dict: Mapping[str, Tensor | np.ndarray]) -> tuple[dict[str, Tensor], str]:
    """Rename the entries of a state dict of any layout to the official names, and transpose matrices where necessary.

    Args:
        state_dict: Names to tensors or NumPy arrays. Wrapper prefixes are removed.

    Returns:
        The state dict with official names in the same order (tensors are shared, not copied, except transposed
        ones), and the layout that was recognised. No entry is dropped.

    Raises:
        TypeError: A value is neither a tensor nor a NumPy array.
        LayoutError: Two entries have the same official name.
    """
    layout = detect_layout(state_dict)
    # In a bare state dict `backbone.` or `model.` is the name of a module of its own, not a wrapper: it stays.
    is_bare = "" in find_prefixes(state_dict)
    official: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        new_name = _translate(unwrapped(name) if is_bare else _strip(name), layout)
        if new_name in official:
            raise LayoutError(f"state_dict holds {new_name!r} twice: {name!r} and another entry both mean it")
        official[new_name] = _relayout(new_name, _as_tensor(name, value), layout)
    return official, layout


def from_official(state_dict: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The inverse of :func:`to_official`: official names to those of ``layout``.

    Args:
        state_dict: Official names to tensors.
        layout: One of :data:`LAYOUTS`.

    Returns:
        The renamed state dict in the same order (tensors are shared, not copied, except transposed ones).

    Raises:
        LayoutError: ``layout`` is unknown, or cannot express this model.
    """
    _check_layout(layout)
    return {foreign_name(name, layout): _relayout(name, value, layout) for name, value in state_dict.items()}


def unwrapped(name: str) -> str:
    """``name`` without the parts that wrappers of single modules add: ``blocks.0`` for ``blocks.0._orig_mod``."""
    for wrapper in _INNER_WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def find_prefixes(names: Iterable[str]) -> list[str]:
    """Every prefix that a T2T-ViT's names have, in any layout; ``""`` for a bare state dict."""
    bare = [unwrapped(name) for name in names]
    prefixes = [name.removesuffix(_ANCHOR) for name in bare if name == _ANCHOR or name.endswith("." + _ANCHOR)]
    return [p for p in prefixes if any(name.startswith(tuple(p + m for m in _TOKEN_MODULES)) for name in bare)]


def names_under(prefix: str, names: Iterable[str]) -> dict[str, str]:
    """The names with a prefix, to the same names without it.

    mmpretrain has the head beside ``backbone.``, not inside: it is included.

    Raises:
        LayoutError: Two entries have the same name.
    """
    bare = {name: unwrapped(name) for name in names}
    found = {name: short.removeprefix(prefix) for name, short in bare.items() if short.startswith(prefix)}
    if prefix.endswith("backbone.") and not any(short.startswith("head.") for short in found.values()):
        beside = prefix.removesuffix("backbone.")
        found |= {n: short.removeprefix(beside) for n, short in bare.items() if short.startswith(f"{beside}head.")}
    owners: dict[str, str] = {}
    for name, short in found.items():
        if owners.setdefault(short, name) != name:
            raise LayoutError(f"state_dict holds {short!r} twice: {owners[short]!r} and {name!r} both mean it")
    return found


def _strip(name: str) -> str:
    name = unwrapped(name)
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name


def _relayout(name: str, value: Tensor, layout: str) -> Tensor:
    """Transpose the weight of a Linear to or from PaddlePaddle's (in, out)."""
    if layout == "paddlevit" and value.ndim == 2 and name.endswith(".weight"):
        return value.t()
    return value


def _as_tensor(name: str, value: Tensor | np.ndarray) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.astype(value.dtype.newbyteorder("="), copy=False))
    raise TypeError(f"state_dict[{name!r}] must be a tensor or a NumPy array, got {type(value).__name__}")


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise LayoutError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
