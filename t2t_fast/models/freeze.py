"""A model for inference alone: norms folded away, weights cast and laid out once."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ..layers import Block, Transition
from ..layers.ghost import GhostAttention, GhostMlp
from ..layers.mlp import Mlp, are_plain
from ..layers.packed_linear import PackedLinear
from .optimize import optimize
from .t2t_vit import T2TViT

# Relative norm of the difference that freezing may make to the logits, by the coarser of the two dtypes.
_ACCEPTED = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class FrozenT2TViT(nn.Module):
    """What :func:`freeze` makes: images to logits, without gradients.

    Attributes:
        notes: What was done to the model, a line each, the agreement found on the probe batch last.
    """

    def __init__(self, model: T2TViT, notes: list[str]) -> None:
        super().__init__()
        self.model = model
        self.notes = notes
        super().train(False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, and of the logits."""
        return self.model.cls_token.dtype

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) of any floating dtype to logits (B, num_classes)."""
        return self.model(x.to(self.dtype) if x.is_floating_point() else x)

    def train(self, mode: bool = True) -> FrozenT2TViT:
        """Raises:
        RuntimeError: ``mode`` is true.
        """
        if mode:
            raise RuntimeError(
                "a frozen model has nothing to train; train the model it was made from, and freeze again"
            )
        return super().train(False)

    def extra_repr(self) -> str:
        return "\n".join(self.notes)


def freeze(model: nn.Module, dtype: torch.dtype | None = None) -> FrozenT2TViT:
    """A copy of ``model`` for the fastest inference, with the same call.

    The LayerNorms' weights and biases go into the Linears behind them, dropout and stochastic depth go, and weights are
    cast once and, for a CPU, rearranged for its products. Before it is returned, its logits for a batch of noise are
    compared with those of ``model``.

    Args:
        model: A :class:`T2TViT`, or whatever :func:`t2t_fast.optimize` makes one of. It is left as it is. Linears that
            hooks watch, adapters wrap or quantisers have replaced are taken over as they are.
        dtype: Of the weights and the logits; None keeps the model's.

    Returns:
        The frozen model, on the same device; its ``notes`` tell what was done.

    Raises:
        TypeError: ``model`` is no T2T-ViT, or ``dtype`` no floating-point dtype.
        RuntimeError: The logits differ by more than the dtype explains: a bug to report.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in _ACCEPTED):
        raise TypeError(f"dtype must be one of {', '.join(map(str, _ACCEPTED))} or None, got {dtype!r}")
    model = optimize(model)
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    notes = []
    own = model.cls_token.dtype
    dtype = own if dtype is None else dtype
    twin = twin.to(torch.promote_types(own, dtype))  # rounded to fewer bits only at the end
    folded = sum(_fold_norms(block) for block in twin.blocks if isinstance(block, Block))
    notes.append(f"{folded} LayerNorms folded into the Linears behind them")
    removed = _remove_dropout(twin)
    if removed:
        notes.append(f"{removed} dropouts and stochastic depths removed")
    twin = twin.to(dtype)
    if dtype != own:
        notes.append(f"weights cast from {own} to {dtype}")
    packed = sum(_pack(module, twin.backend) for module in (*twin.blocks, twin))
    notes.append(f"{packed} Linears laid out for inference")
    frozen = FrozenT2TViT(twin, notes)
    notes.append(_compare(model, frozen))
    return frozen


def _fold_norms(block: Block) -> int:
    """Fold the block's two norms; returns how many could be."""
    attn: Any = block.attn
    mlp: Any = block.mlp
    behind_norm1 = (attn.q, attn.k, attn.v) if isinstance(attn, GhostAttention) else (attn.qkv,)
    folded = 0
    for name, linears in (("norm1", behind_norm1), ("norm2", (mlp.fc1,))):
        norm: Any = block.get_submodule(name)
        plain = isinstance(norm, nn.LayerNorm) and norm.elementwise_affine
        if plain and are_plain(norm, *linears):
            for linear in linears:
                _fold(norm, linear)
            setattr(block, name, nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False))
            folded += 1
    return folded


@torch.no_grad()
def _fold(norm: Any, linear: Any) -> None:
    """W (gamma z + beta) + b = (W gamma) z + (W beta + b)."""
    weight = linear.weight.double()
    if norm.bias is not None:
        offset = weight @ norm.bias.double()
        if linear.bias is not None:
            linear.bias.copy_(linear.bias.double() + offset)
        else:
            linear.bias = nn.Parameter(offset.to(linear.weight.dtype), requires_grad=False)
    linear.weight.copy_(weight * norm.weight.double())


def _remove_dropout(model: nn.Module) -> int:
    """Replace dropout and stochastic depth by nothing; returns how many would have done something in training."""
    removed = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Dropout | DropPath):
                removed += (child.p if isinstance(child, nn.Dropout) else child.drop_prob or 0) > 0
                setattr(parent, name, nn.Identity())
    return removed


def _pack(module: nn.Module, backend: str) -> int:
    """Replace the Linears of a block, or the head of the model; returns how many."""
    count = 0

    def replace(parent: nn.Module, name: str, activation: str | None = None) -> None:
        nonlocal count
        linear = getattr(parent, name, None)
        if not isinstance(linear, nn.Linear) or not are_plain(linear):
            return
        gelu = activation is not None and are_plain(getattr(parent, activation))
        setattr(parent, name, PackedLinear(linear, gelu, backend))
        if activation is not None and gelu:
            setattr(parent, activation, nn.Identity())
        count += 1

    if isinstance(module, Block):
        for name in ("qkv", "q", "k", "v", "proj"):
            replace(module.attn, name)
        if isinstance(module.mlp, Mlp):
            replace(module.mlp, "fc1", "act")
            replace(module.mlp, "fc2")
        elif isinstance(module.mlp, GhostMlp):
            replace(module.mlp, "fc1")
            replace(module.mlp, "fc2")
        replace(module, "dense_linear")
    elif isinstance(module, Transition):
        replace(module, "linear", "act")
    elif isinstance(module, T2TViT):
        replace(module, "head")
    return count


@torch.no_grad()
def _compare(model: T2TViT, frozen: FrozenT2TViT) -> str:
    """Logits of both for two images of noise; returns what was found."""
    like = model.cls_token
    generator = torch.Generator().manual_seed(0)
    shape = (2, model.tokens_to_token.in_chans, *model.img_size)
    images = torch.randn(shape, generator=generator).to(like.device, like.dtype)
    training = [module for module in model.modules() if module.training]
    try:
        want = model.eval()(images).double()
    finally:
        for module in training:
            module.training = True
    error = ((frozen(images).double() - want).norm() / want.norm().clamp_min(1e-30)).item()
    accepted = max(_ACCEPTED[like.dtype], _ACCEPTED[frozen.dtype])
    if not error <= accepted:
        raise RuntimeError(
            f"freezing changed the logits of a probe batch by {error:.1e} of their norm, more than the {accepted:.0e} "
            f"that {frozen.dtype} explains: please report it"
        )
    return f"logits of a probe batch agree to {error:.1e} (accepted: {accepted:.0e})"
