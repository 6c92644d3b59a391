"""A model for inference alone: norms folded into Linears, weights cast and packed once."""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ..layers import Attention, Block, SEMlp, TokenPerformer, TokenTransformer, Transition
from ..layers.ghost import GhostAttention, GhostMlp
from ..layers.mlp import Mlp
from ..layers.packed_linear import PackedLinear
from ..layers.plain import are_plain, is_patched, is_plain_weight, is_watched
from ..layers.token_transformer import TokenAttention
from ..models.adopt import optimize
from ..models.t2t_vit import T2TViT
from ..numerics import no_autocast

# Relative norm of the difference that freezing may make to the logits, by the coarser of the two dtypes.
_ACCEPTED = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_RATES: dict[type[nn.Module], str] = {nn.Dropout: "p", DropPath: "drop_prob"}  # what freezing takes out


class FrozenT2TViT(nn.Module):
    """What :func:`freeze` makes: images to logits, or to features, without gradients.

    A module that holds it cannot ``train()`` either: keep a frozen teacher beside its student, not in it.

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

    @property
    def num_classes(self) -> int:
        """Width of the logits."""
        return self.model.num_classes

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) of any floating dtype to logits (B, num_classes)."""
        return self.model(self._cast(x))

    @torch.no_grad()
    def forward_features(self, x: Tensor) -> Tensor:
        """As :meth:`T2TViT.forward_features`."""
        return self.model.forward_features(self._cast(x))

    @torch.no_grad()
    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`T2TViT.forward_intermediates`."""
        return self.model.forward_intermediates(self._cast(x), *args, **kwargs)

    def _cast(self, x: Tensor) -> Tensor:
        is_float = hasattr(x, "is_floating_point") and x.is_floating_point()  # anything else is refused by the model
        return x.to(self.dtype) if is_float else x

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

    The weights and biases of the blocks' and token layers' LayerNorms go into the Linears behind them, dropout and
    stochastic depth go, and weights are cast once and, for a CPU, packed for its matmuls. Before the copy is returned,
    its logits for a batch of noise are compared with those of ``model``.

    Args:
        model: A :class:`T2TViT`, or whatever :func:`t2t_fast.optimize` makes one of. It is left as it is. Modules that
            are hooked, wrapped by adapters or replaced by quantisers are copied unchanged, and so are weights that
            several modules share. A frozen model is returned, or copied to another ``dtype``.
        dtype: Of the weights and the logits; None keeps the model's.

    Returns:
        The frozen model, on the same device; its ``notes`` tell what was done.

    Raises:
        TypeError: ``model`` is no T2T-ViT, or ``dtype`` no floating-point dtype.
        ValueError: ``model`` is on the meta device, or has weights that are not finite.
        RuntimeError: The logits are not finite in ``dtype``; or they differ by more than rounding explains, which is a
            bug to report.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in _ACCEPTED):
        raise TypeError(f"dtype must be one of {', '.join(map(str, _ACCEPTED))} or None, got {dtype!r}")
    if isinstance(model, FrozenT2TViT):
        return model if dtype in (None, model.dtype) else _recast(model, dtype)
    model = optimize(model)
    if model.cls_token.is_meta:
        raise ValueError("model is on the meta device, got no weights to freeze; load them first")
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        if is_plain_weight(weight) and not torch.isfinite(weight).all():
            raise ValueError(f"model has weights that are not finite: {name} holds NaN or infinity")
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    notes = []
    own = model.cls_token.dtype
    dtype = own if dtype is None else dtype
    twin = twin.to(torch.promote_types(own, dtype))  # rounded to fewer bits only at the end
    uses = Counter(id(parameter) for _, parameter in twin.named_parameters(remove_duplicate=False))
    folded = sum(_fold_norms(module, uses) for module in list(twin.modules()))
    notes.append(f"{folded} LayerNorms folded into the Linears behind them")
    removed = _remove_dropout(twin)
    if removed:
        notes.append(f"{removed} dropouts and stochastic depths removed")
    twin = twin.to(dtype)
    if dtype != own:
        notes.append(f"weights cast from {own} to {dtype}")
    packed = sum(_pack(module, twin.backend) for module in (*twin.blocks, twin))
    notes.append(f"{packed} Linears packed for inference")
    frozen = FrozenT2TViT(twin, notes)
    notes.append(_compare(model, frozen))
    return frozen


def _recast(frozen: FrozenT2TViT, dtype: torch.dtype) -> FrozenT2TViT:
    """A copy in another dtype."""
    other = copy.deepcopy(frozen).to(dtype)
    other.notes[-1:] = [f"weights cast from {frozen.dtype} to {dtype}", _compare(frozen.model, other)]
    return other


def _fold_norms(module: Any, uses: Counter[int]) -> int:
    """Fold the two norms of a block or a token layer into the Linears behind them; returns how many were folded.

    A norm stays where a module in between is hooked, or where a Linear's weights serve other modules, too (``uses``
    counts the owners of each weight).
    """
    folded = 0
    for name, branch, linears in _norms_of(module):
        norm: Any = module.get_submodule(name)
        alone = all(uses[id(parameter)] == 1 for linear in linears for parameter in linear.parameters())
        plain = isinstance(norm, nn.LayerNorm) and norm.elementwise_affine
        if plain and linears and alone and are_plain(norm, *linears) and not is_watched(branch):
            behind_split = name == "norm1" and not isinstance(module, Block)
            for linear in linears:
                _fold(norm, linear, centre=behind_split)
            setattr(module, name, nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False))
            if behind_split:
                module.folded = True
            folded += 1
    return folded


def _norms_of(module: Any) -> list[tuple[str, Any, list[Any]]]:
    """For each norm: its name, the branch behind it, and the Linears that the branch applies to its input."""
    if is_patched(module):
        return []
    if type(module) is TokenPerformer:
        known = type(module.mlp) is nn.Sequential and len(module.mlp) > 0
        return [("norm1", module.kqv, [module.kqv]), ("norm2", module.mlp, [module.mlp[0]] if known else [])]
    if type(module) is TokenTransformer or isinstance(module, Block):
        return [("norm1", module.attn, _behind(module.attn)), ("norm2", module.mlp, _behind(module.mlp))]
    return []


def _behind(branch: Any) -> list[Any]:
    """The Linears that a branch applies to its input; none for a branch of another package."""
    if type(branch) is GhostAttention:
        return [branch.q, branch.k, branch.v]
    if type(branch) in (Attention, TokenAttention):
        return [branch.qkv]
    return [branch.fc1] if type(branch) in (Mlp, SEMlp, GhostMlp) else []


@torch.no_grad()
def _fold(norm: Any, linear: Any, centre: bool) -> None:
    """W (gamma z + beta) + b = (W gamma) z + (W beta + b), on the CPU: not every device has float64.

    ``centre`` takes each row's mean out of W gamma, which changes nothing: z has the mean 0.
    """
    weight = linear.weight.cpu().double()
    if norm.bias is not None:
        offset = weight @ norm.bias.cpu().double()
        if linear.bias is not None:
            linear.bias.copy_(linear.bias.cpu().double() + offset)
        else:
            linear.bias = nn.Parameter(offset.to(linear.weight), requires_grad=False)
    weight = weight * norm.weight.cpu().double()
    linear.weight.copy_(weight - weight.mean(dim=1, keepdim=True) if centre else weight)


def _remove_dropout(model: nn.Module) -> int:
    """Replace dropout and stochastic depth by nothing; returns how many would have done something in training."""
    removed = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            rate = _RATES.get(type(child))
            if rate is not None and not is_watched(child):
                removed += (getattr(child, rate) or 0) > 0
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
        if type(module.attn) in (Attention, GhostAttention):
            for name in ("qkv", "q", "k", "v", "proj"):
                replace(module.attn, name)
        if type(module.mlp) in (Mlp, GhostMlp):
            replace(module.mlp, "fc1", "act" if type(module.mlp) is Mlp else None)
            replace(module.mlp, "fc2")
        replace(module, "dense_linear")
    elif isinstance(module, Transition):
        replace(module, "linear", "act")
    elif isinstance(module, T2TViT):
        replace(module, "head")
    return count


def relative_error(got: Tensor, want: Tensor) -> float:
    """``|got - want| / |want|``, in float64 on the CPU."""
    got, want = got.cpu().double(), want.cpu().double()
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


@torch.no_grad()
def _compare(model: T2TViT, frozen: FrozenT2TViT) -> str:
    """Logits of both for two images of noise; returns what was found."""
    like = model.cls_token
    generator = torch.Generator().manual_seed(0)
    shape = (2, model.tokens_to_token.in_chans, *model.img_size)
    images = torch.randn(shape, generator=generator, device="cpu").to(like.device, like.dtype)
    images[1] += 2  # far from zero
    training = [module for module in model.modules() if module.training]
    with no_autocast(images):
        try:
            want = model.eval()(images)
        finally:
            for module in training:
                module.training = True
        error = relative_error(frozen(images), want)
    accepted = max(_ACCEPTED[like.dtype], _ACCEPTED[frozen.dtype])
    if not math.isfinite(error):
        raise RuntimeError(
            f"the logits of a probe batch are not finite in {like.dtype} or in {frozen.dtype}, whose range may be too "
            "small for these weights; take torch.bfloat16 or torch.float32"
        )
    if error > accepted:
        raise RuntimeError(
            f"freezing changed the logits of a probe batch by {error:.1e} of their norm, more than the {accepted:.0e} "
            f"that {frozen.dtype} explains: please report it"
        )
    return f"logits of a probe batch agree to {error:.1e} (accepted: {accepted:.0e})"
