"""When the last block may run for the cls token alone, because the logits depend on no other token of its result.

Everything is looked at in every call and nothing is kept, so that no change of a model is missed. Whoever watches,
replaces or patches something between the last block and the head sees all tokens there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ..layers import Attention, Block, DenseBlock, GhostAttention, GhostMlp, SELayer
from ..layers.ghost import ChannelScale
from ..layers.mlp import Mlp
from ..layers.packed_linear import PackedLinear
from ..layers.plain import class_of, is_plain_weight, is_watched

# The names of the parts, but for the two with parts of their own.
_ROLES = frozenset(("attn", "mlp"))
_BLOCKS: dict[Any, tuple[str, ...]] = {
    Block: ("norm1", "drop_path", "norm2"),
    DenseBlock: ("norm1", "drop_path", "norm2", "dense_linear"),
}
_ATTENTIONS: dict[Any, tuple[str, ...]] = {
    Attention: ("qkv", "attn_drop", "proj", "se_layer", "proj_drop"),
    GhostAttention: ("q", "k", "v", *(f"cheap_operation_{name}" for name in "qkv"), "attn_drop", "proj", "proj_drop"),
}
_MLPS: dict[Any, tuple[str, ...]] = {
    Mlp: ("fc1", "act", "drop1", "norm", "fc2", "drop2"),
    GhostMlp: ("fc1", "act", "fc2", "drop", "cheap_operation2", "cheap_operation3"),
}
# Parts that map every token by itself.
_PER_TOKEN = frozenset(
    (nn.Linear, PackedLinear, nn.LayerNorm, nn.GELU, nn.Dropout, DropPath, nn.Identity, ChannelScale)
)
# Of the classes, which some replace.
_FORWARDS = {kind: kind.forward for kind in (*_BLOCKS, *_ATTENTIONS, *_MLPS, *_PER_TOKEN, SELayer)}


def may_run_cls_alone(model: Any, methods: Mapping[str, Callable[..., Any]], x: Any) -> bool:
    """Whether it is worth asking :func:`why_not_cls_alone` later: ``model`` has ``methods``, and ``x`` is a tensor."""
    if not isinstance(x, Tensor) or model.global_pool != "token":  # a tracer's proxy is no Tensor
        return False
    kind, own = type(model), model.__dict__
    for name, method in methods.items():
        if getattr(kind, name) is not method or name in own:
            return False
    return class_of(model.blocks) is nn.ModuleList and len(model.blocks) > 0


def why_not_cls_alone(model: Any, block: Any, x: Tensor) -> str | None:
    """Why the last ``block`` of ``model`` must run for all tokens ``x``; None if the first is enough.

    Ask just before it runs: a hook may have changed the model.
    """
    if model.global_pool != "token":
        return "the logits depend on all tokens"
    if not is_plain_weight(x):
        return "the tokens are no plain tensor"
    kind_of: Any = class_of if torch.compiler.is_exporting() else type
    modules = [model._modules.get("norm")]
    if kind_of(modules[0]) not in _PER_TOKEN or "norm" in model.__dict__:
        return "the last norm is of a kind that may mix tokens"
    parts = block._modules
    for known, owner in ((_BLOCKS, block), (_ATTENTIONS, parts.get("attn")), (_MLPS, parts.get("mlp"))):
        names = known.get(kind_of(owner))
        if names is None:
            return "the last block, its attention or its MLP is of another kind"
        modules.append(owner)
        own, found = owner.__dict__, owner._modules
        for name in names:
            if name in own:
                return "a part of the last block hides behind another"
            part = found.get(name)
            kind = kind_of(part)
            if kind not in _PER_TOKEN and (kind is not SELayer or name != "se_layer"):
                return "a part of the last block is of a kind that may mix tokens"
            modules.append(part)
        if not _ROLES.isdisjoint(own):
            return "a part of the last block hides behind another"
    return _why_not_as_made(modules, kind_of)


def _why_not_as_made(modules: list[Any], kind_of: Callable[[Any], Any]) -> str | None:
    """Why these modules of known classes may do something else; None if they do as they were made to."""
    if Block.forward is not _FORWARDS[Block]:  # which a DenseBlock calls
        return "a class has another forward"
    for module in modules:
        kind = kind_of(module)
        if kind.forward is not _FORWARDS[kind]:
            return "a class has another forward"
        if kind is nn.LayerNorm and len(module.normalized_shape) != 1:
            return "a LayerNorm is over more than the channels"
        if module._parameters or module._buffers:
            for weight in (*module._parameters.values(), *module._buffers.values()):
                if weight is not None and not is_plain_weight(weight):
                    return "a weight is no plain tensor"
    return "a module is hooked, patched or compiled by itself" if is_watched(*modules) else None
