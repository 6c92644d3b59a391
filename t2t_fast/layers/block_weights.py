"""The weights of a standard block, for :func:`whole_block`: where it may run in place of the modules and their ops.

Everything is looked at in every call and nothing is kept, so that no change of a block is missed. Whoever changes what
the modules of a standard block compute must change :func:`whole_block` too, or :func:`weights_for`.

The checks are written for speed: through the modules' dictionaries, in loops, with few calls.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, use_fused_attn
from torch import Tensor, nn

from ..dispatch import is_explaining, resolve_backend
from ..ops.block.aten import packs, uses_onednn
from ..ops.block.triton import why_not_auto_add_layer_norm
from ..ops.block.whole import BlockWeights, LinearWeights
from ..ops.common.autograd import runs_eagerly
from ..ops.common.extension import multiplies
from ..ops.common.norm import Norm
from .attention import Attention
from .mlp import Mlp
from .packed_linear import PackedLinear
from .plain import are_plain, is_watched

# Of the classes, which some replace to see the attention weights.
_FORWARDS = Attention.forward, Mlp.forward
# The names of the parts.
_BLOCK = frozenset(("norm1", "attn", "drop_path", "norm2", "mlp"))
_ATTENTION = frozenset(("qkv", "attn_drop", "proj", "se_layer", "proj_drop"))
_MLP = frozenset(("fc1", "act", "drop1", "norm", "fc2", "drop2"))


def weights_for(block: Any, x: Any, num_tokens: int | None = None) -> BlockWeights | None:
    """What :func:`whole_block` needs for ``block`` and ``num_tokens``, or None if the block must run op by op.

    It must under torch.compile, tracing, torch.func and CPU autocast, with :func:`t2t_fast.explain`, another backend,
    another design, dropout, or parts that were replaced, hooked or patched; and on a GPU, where the tokens are so many
    that the kernel of ``add_layer_norm`` pays.
    """
    if not runs_eagerly(x) or is_explaining() or not use_fused_attn():
        return None
    parts, attn, mlp = block._modules, block._modules.get("attn"), block._modules.get("mlp")
    if not _are_standard(attn, mlp):
        return None
    backend = resolve_backend(attn.backend)
    if backend not in ("auto", "aten") or not _have_parts(block, attn, mlp):
        return None
    attn_parts, mlp_parts = attn._modules, mlp._modules
    norms, drop_path = (parts["norm1"], parts["norm2"]), parts["drop_path"]
    linears = attn_parts["qkv"], attn_parts["proj"], mlp_parts["fc1"], mlp_parts["fc2"]
    silent: tuple[Any, ...] = attn_parts["attn_drop"], attn_parts["proj_drop"], attn_parts["se_layer"]
    silent += mlp_parts["drop1"], mlp_parts["norm"], mlp_parts["drop2"]
    if type(drop_path) not in (nn.Identity, DropPath):
        return None
    if not _are_silent(silent) or is_watched(attn, mlp, drop_path, *silent) or not are_plain(*norms):
        return None
    packed = _are_packed(linears, mlp_parts["act"], attn.backend)
    if not packed and not _are_linear(linears, mlp_parts["act"]):
        return None
    weights = [linear._buffers if packed else linear._parameters for linear in linears]
    if not _are_alike(x, weights, norms) or why_not_auto_add_layer_norm(x, x) is None:
        return None
    packed = packed and packs(x)
    if packed:
        onednn = [linear.packed(x.dtype) for linear in linears]
    else:
        onednn = [w["weight"] for w in weights] if uses_onednn(x) else [None] * 4
    qkv, proj, fc1, fc2 = [LinearWeights(w["weight"], w["bias"], o) for w, o in zip(weights, onednn, strict=True)]
    query = None
    if num_tokens is not None:
        query, qkv = _in_parts(qkv, linears[0] if packed else None, x.dtype)
    norm1, norm2 = _norm_of(norms[0], x), _norm_of(norms[1], x)
    native = backend == "auto" and multiplies(x.device.type, x.dtype)
    heads = attn.num_heads, attn.head_dim
    return BlockWeights(norm1, query, qkv, proj, norm2, fc1, fc2, *heads, attn.scale, native)


def _in_parts(
    qkv: LinearWeights, packed: PackedLinear | None, dtype: torch.dtype
) -> tuple[LinearWeights, LinearWeights]:
    """The Linear of the queries, and that of keys and values; packed for ``dtype`` if ``qkv`` is ``packed``."""
    width = qkv.weight.shape[0] // 3  # not that of the tokens where heads were pruned
    weights = qkv.weight.split((width, 2 * width))
    biases = (None, None) if qkv.bias is None else qkv.bias.split((width, 2 * width))
    onednn: Sequence[Tensor | None] = (None, None) if qkv.onednn is None else weights
    if packed is not None:
        onednn = packed.packed(dtype, (0, width)), packed.packed(dtype, (width, 3 * width))
    query, rest = [LinearWeights(*part) for part in zip(weights, biases, onednn, strict=True)]
    return query, rest


def _are_standard(attn: Any, mlp: Any) -> bool:
    """Whether these are the branches that :func:`whole_block` knows, with one backend."""
    return (
        type(attn) is Attention
        and type(mlp) is Mlp
        and (Attention.forward, Mlp.forward) == _FORWARDS
        and attn.fused_attn
        and type(attn.scale) is float
        and mlp.backend == attn.backend
    )


def _have_parts(block: Any, attn: Any, mlp: Any) -> bool:
    """Whether each has its parts where torch registers modules, and nothing else under their names."""
    for module, names in ((block, _BLOCK), (attn, _ATTENTION), (mlp, _MLP)):
        if not names <= module._modules.keys() or not names.isdisjoint(module.__dict__):
            return False
    return "_split_heads" not in attn.__dict__


def _are_silent(modules: Sequence[Any]) -> bool:
    """Whether these modules pass everything on as it is: nothing, or a Dropout that does not drop now."""
    for module in modules:
        if type(module) is nn.Dropout:
            if module.training and module.p:
                return False
        elif type(module) is not nn.Identity:
            return False
    return True


def _are_linear(linears: Sequence[Any], act: Any) -> bool:
    """Whether all are plain Linears, with a plain GELU behind the third."""
    for linear in linears:
        if type(linear) is not nn.Linear:
            return False
    return type(act) is nn.GELU and are_plain(*linears, act)


def _are_packed(linears: Sequence[Any], act: Any, backend: str) -> bool:
    """Whether all are packed Linears in inference, with the GELU in the third."""
    for linear in linears:
        if type(linear) is not PackedLinear or linear.backend != backend or linear.gelu != (linear is linears[2]):
            return False
        weights: dict[str, Any] = linear._buffers
        if "bias" not in weights or "weight" not in weights:
            return False
        if type(weights["weight"]) is not Tensor or weights["weight"].layout is not torch.strided:
            return False  # quantised since
    return type(act) is nn.Identity and not torch.is_grad_enabled() and not is_watched(act, *linears)


def _are_alike(x: Tensor, weights: Sequence[dict[str, Any]], norms: Sequence[Any]) -> bool:
    """Whether tokens and weights have one dtype, device and width. Others are refused op by op, in words."""
    dtype, device, width = x.dtype, x.device, x.shape[-1:]
    if x.dim() != 3 or x.numel() == 0:
        return False
    for norm in norms:
        if norm.normalized_shape != width:
            return False
    for holder in (*weights, norms[0]._parameters, norms[1]._parameters):
        weight, bias = holder["weight"], holder["bias"]
        for tensor in (weight, bias):
            if tensor is not None and (tensor.dtype is not dtype or tensor.device != device):
                return False
    return True


def _norm_of(norm: Any, x: Tensor) -> Norm:
    weight, bias = norm._parameters["weight"], norm._parameters["bias"]
    if weight is None and bias is None and x.device.type == "cpu":  # torch's kernel takes twice as long then
        weight, bias = _ones_and_zeros(x.shape[-1], x.dtype)
    return Norm(weight, bias, norm.eps)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _ones_and_zeros(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.ones(width, dtype=dtype, device="cpu"), torch.zeros(width, dtype=dtype, device="cpu")
