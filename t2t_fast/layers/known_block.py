"""A standard block whose parts are as they were made: what its ops would choose, chosen once and remembered."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from timm.layers import DropPath, use_fused_attn
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..dispatch import is_explaining, resolve_backend
from ..ops.block.aten import why_not_onednn, why_not_packed
from ..ops.block.triton import why_not_auto_add_layer_norm
from ..ops.block.whole import BlockWeights, Product
from ..ops.common.autograd import is_plain_eager
from ..ops.common.norm import Norm
from .attention import Attention
from .mlp import Mlp
from .packed_linear import PackedLinear
from .parts import Parts
from .plain import are_plain, dropout_rate, is_plain_weight


class KnownBlock(NamedTuple):
    """A block's parts and weights as they were when it was looked at."""

    parts: Parts
    weights: BlockWeights
    is_packed: bool

    def fits(self, block: Any, x: Tensor) -> bool:
        """Whether the weights are still those of ``block``, and for tokens like ``x``."""
        weight = self.weights.qkv.weight
        return (
            self.parts.root is block
            and x.dtype == weight.dtype
            and x.device == weight.device
            and x.dim() == 3
            and x.shape[2] == weight.shape[1]
            and x.numel() > 0
            and not (self.is_packed and torch.is_grad_enabled())
            and self.parts.unchanged()
        )


def known_block(block: Any, x: Any, known: KnownBlock | None) -> KnownBlock | None:
    """``known`` where it still fits, else what a new look at ``block`` finds; None where ops or modules must be called.

    They must for compilers, tracers, hooks and the like, and for autocast on the CPU; where another backend is asked
    for, or :func:`t2t_fast.explain` wants to hear of the ops; with dropout; and in blocks of another design.
    """
    if not is_plain_eager(x) or is_explaining() or _has_any_global_hook() or not use_fused_attn():
        return None
    if resolve_backend(getattr(block.attn, "backend", "auto")) not in ("auto", "aten"):
        return None
    if why_not_auto_add_layer_norm(x, x) is None:  # the kernel is worth asking op by op
        return None
    if known is not None and known.fits(block, x):
        return known
    known = _look(block, x) if _is_standard(block) else None
    return known if known is not None and known.fits(block, x) else None


def _is_standard(block: Any) -> bool:
    """Whether ``whole_block`` computes what the modules of ``block`` do, if nobody watches them."""
    attn, mlp = block.attn, block.mlp
    if type(attn) is not Attention or type(mlp) is not Mlp or not attn.fused_attn:
        return False
    if type(attn.se_layer) is not nn.Identity or type(mlp.norm) is not nn.Identity:
        return False
    if type(block.drop_path) not in (nn.Identity, DropPath) or any(
        dropout_rate(drop) != 0 for drop in _dropouts(block)
    ):
        return False
    packed, fc1 = _packed(block), _linears(block)[2]
    has_gelu = [linear is fc1 for linear in packed if linear.gelu]
    activated = type(mlp.act) is nn.Identity if has_gelu == [True] else not has_gelu and are_plain(mlp.act)
    return (
        activated
        and len({part.backend for part in (attn, mlp, *packed)}) == 1
        and all(is_plain_weight(linear.weight) for linear in packed)
        and are_plain(block.norm1, block.norm2, *(linear for linear in _linears(block) if linear not in packed))
    )


def _look(block: Any, x: Tensor) -> KnownBlock | None:
    attn, norms, linears, packed = block.attn, (block.norm1, block.norm2), _linears(block), _packed(block)
    weights = [weight for module in (*linears, *norms) for weight in (module.weight, module.bias) if weight is not None]
    if any(w.dtype != x.dtype or w.device != x.device or w.is_inference() or not w.is_leaf for w in weights):
        return None
    settings = [(attn, name) for name in ("backend", "fused_attn", "num_heads", "scale")]
    settings += [(part, "backend") for part in (block.mlp, *packed)]
    settings += [(norm, "eps") for norm in norms]
    settings += [(drop, name) for drop in _dropouts(block) for name in ("training", "p")]
    parts = Parts(block, settings, [linear.weight for linear in packed])
    qkv, proj, fc1, fc2 = (_product(linear, x) for linear in linears)
    norm1, norm2 = (_norm(norm, x) for norm in norms)
    return KnownBlock(parts, BlockWeights(norm1, qkv, proj, norm2, fc1, fc2, attn.num_heads, attn.scale), bool(packed))


def _linears(block: Any) -> tuple[Any, Any, Any, Any]:
    return block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2


def _packed(block: Any) -> list[PackedLinear]:
    return [linear for linear in _linears(block) if type(linear) is PackedLinear]


def _dropouts(block: Any) -> tuple[nn.Module, ...]:
    return block.attn.attn_drop, block.attn.proj_drop, block.mlp.drop1, block.mlp.drop2


def _product(linear: Any, x: Tensor) -> Product:
    weight, onednn = linear.weight, None
    if type(linear) is PackedLinear and not why_not_packed(x, weight):
        onednn = linear.packed(x.dtype)
    elif not why_not_onednn(x, weight, linear.bias):
        onednn = weight
    return Product(weight, linear.bias, onednn)


def _norm(norm: Any, x: Tensor) -> Norm:
    if norm.weight is None and norm.bias is None and x.device.type == "cpu":  # torch's kernel takes twice as long then
        return Norm(x.new_ones(x.shape[-1]), x.new_zeros(x.shape[-1]), norm.eps)
    return Norm(norm.weight, norm.bias, norm.eps)
