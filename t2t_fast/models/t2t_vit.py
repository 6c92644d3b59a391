"""T2T-ViT (Yuan et al., ICCV 2021, arXiv 2101.11986), with timm's model interface and the official state dict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import get_norm_layer, trunc_normal_
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.types import Device

from ..checks import LARGEST, as_pair, check_count, check_flag, check_probability, factory_options
from ..dispatch import check_backend, is_explaining, note, resolve_backend, use_backend
from ..layers import Block, TokensToToken
from ..numerics import compute_dtype
from .adapt import adapt_state_dict
from .architecture import check_entries
from .checkpoints import grid_of_config, load_checkpoint, log_notes
from .cls_alone import may_run_cls_alone, why_not_cls_alone
from .containers import find_weights
from .layouts import to_official
from .pos_embed import TableCache, resize_table, sinusoid_table, table_for_grid
from .weight_files import GRID_KEY

try:
    from timm.models._input import update_model_input_size
except ImportError:  # timm before 1.0.31 does not record the size
    update_model_input_size = None  # type: ignore[assignment]

torch.fx.wrap("table_for_grid")

GLOBAL_POOLS = ("token", "avg", "")


class T2TViT(nn.Module):
    """Tokens-to-Token Vision Transformer.

    From image to logits (paper Fig. 2): three soft splits, with a token layer after each of the first two; a cls token
    in front, plus a fixed sinusoid position table; ``depth`` pre-norm blocks; LayerNorm; the cls token alone; head.
    Parameter names are the official ones.

    Args:
        img_size: Height and width of the images in pixels, an int or a pair.
        tokens_type: Token layers: ``"performer"``, ``"transformer"`` or ``"convolution"``.
        in_chans: Channels of the images.
        num_classes: Width of the head; 0 for no head.
        embed_dim: Width of the backbone.
        depth: Number of blocks.
        num_heads: Attention heads per block.
        mlp_ratio: Hidden width of the blocks' MLP over ``embed_dim``.
        qkv_bias: Whether the blocks' q, k, v projections have a bias.
        qk_scale: Factor on the blocks' attention scores; None means ``head_dim**-0.5``, as for all released
            checkpoints.
        drop_rate: Dropout after the position table, after projections and inside the blocks' MLPs.
        attn_drop_rate: Dropout on the blocks' attention weights.
        drop_path_rate: Stochastic depth rate of the last block; the rates rise linearly from 0 in the first block.
        norm_layer: Class of the blocks' norms and the last norm; None and ``"layernorm"`` mean ``nn.LayerNorm``, other
            names are those of ``timm.layers.get_norm_layer``.
        token_dim: Width of the tokens between the soft splits.
        block_type: See :class:`t2t_fast.layers.Block`.
        token_drop_rate: Dropout inside Performer token layers; the original fixes it at 0.1.
        global_pool: ``"token"`` (cls token), ``"avg"`` (mean over the other tokens) or ``""`` (none).
        dynamic_img_size: Accept images of any size per call; the position table is interpolated and cached.
        backend: Backend of every op in the model; ``"auto"`` leaves the choice to :func:`t2t_fast.use_backend`.
        device: Device of the parameters; None for torch's default device.
        dtype: Floating-point dtype of the parameters; None for torch's default.

    Counts and sizes may be anything with ``__index__``, such as NumPy's integers; they are stored as plain ints.

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: An argument has an impossible value.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        tokens_type: str = "performer",
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] | str | None = None,
        token_dim: int = 64,
        block_type: str = "standard",
        token_drop_rate: float = 0.1,
        global_pool: str = "token",
        dynamic_img_size: bool = False,
        backend: str = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options = factory_options(device, dtype)
        check_flag("qkv_bias", qkv_bias)
        check_flag("dynamic_img_size", dynamic_img_size)
        drop_rate = check_probability("drop_rate", drop_rate)
        attn_drop_rate = check_probability("attn_drop_rate", attn_drop_rate)
        drop_path_rate = check_probability("drop_path_rate", drop_path_rate)
        token_drop_rate = check_probability("token_drop_rate", token_drop_rate)
        self.in_chans = check_count("in_chans", in_chans, 1)
        self.num_classes = check_count("num_classes", num_classes, 0)
        self.embed_dim = check_count("embed_dim", embed_dim, 1)
        self.num_prefix_tokens = 1
        self.global_pool = _check_global_pool(global_pool)
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False
        self.backend = check_backend(backend)
        self.img_size = as_pair("img_size", img_size, 16)
        depth, token_dim = check_count("depth", depth, 1), check_count("token_dim", token_dim, 1)
        norm_layer = _find_norm_layer(norm_layer)
        if block_type == "dense" and self._make_block is Block:
            raise ValueError("block_type='dense' needs growing blocks: make the model with T2TViTDense")

        self.tokens_to_token = TokensToToken(
            self.in_chans, self.embed_dim, token_dim, tokens_type, token_drop_rate, backend, **options
        )
        self.grid_size = self.tokens_to_token.grids(*self.img_size)[2]
        self._add_cls_token_and_positions(**options)
        self.pos_drop = nn.Dropout(drop_rate)
        make_block = partial(
            self._make_block,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            drop=drop_rate,
            attn_drop=attn_drop_rate,
            norm_layer=norm_layer,
            block_type=block_type,
            backend=backend,
            **options,
        )
        drop_path_rates = torch.linspace(0, drop_path_rate, depth, device="cpu", dtype=torch.float32).tolist()
        self.blocks, self.num_features = self._make_blocks(make_block, drop_path_rates, **options)
        self.head_hidden_size = self.num_features
        self.norm = norm_layer(self.num_features, **options)
        self.head = nn.Linear(self.num_features, self.num_classes, **options) if self.num_classes else nn.Identity()
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": num_chs, "reduction": 16, "module": f"blocks.{i}"}
            for i, num_chs in enumerate(self._block_widths())
        ]
        self.init_weights(needs_reset=False)
        self.register_state_dict_post_hook(_record_grid)

    _make_block: Callable[..., nn.Module] = Block

    def _add_cls_token_and_positions(self, **options: Any) -> None:
        """Register both parameters, uninitialised; ``options`` are their device and dtype."""
        num_tokens = self.grid_size[0] * self.grid_size[1] + self.num_prefix_tokens
        if num_tokens * self.embed_dim > LARGEST:
            raise ValueError(f"img_size={self.img_size} makes {num_tokens} tokens, too many for a position table")
        self.cls_token = nn.Parameter(torch.empty(1, 1, self.embed_dim, **options))
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, self.embed_dim, **options), requires_grad=False)
        self._tables: TableCache = {}

    def _make_blocks(
        self, make_block: Callable[..., nn.Module], drop_path_rates: list[float], **options: Any
    ) -> tuple[nn.ModuleList, int]:
        """The blocks, and the width of the last block's output; ``options`` are for parameters outside blocks."""
        blocks = [make_block(self.embed_dim, drop_path=rate) for rate in drop_path_rates]
        return nn.ModuleList(blocks), self.embed_dim

    def _block_widths(self) -> list[int]:
        """Output channels of every entry of ``blocks``."""
        return [self.embed_dim] * len(self.blocks)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise all parameters as the original: truncated normal (0.02) Linear weights and cls token, zero biases.

        The same random seed gives the values of a new model. Call it after ``to_empty`` on a model that was made on the
        meta device.

        Args:
            needs_reset: Reset all modules first; False if they have just been constructed.
        """
        for module in _children_first(self) if needs_reset else (self,):
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _init_linear(module)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the cls token and the position table, the parameters of this module itself."""
        _truncated_normal_(self.cls_token)
        table = self.pos_embed
        table.copy_(sinusoid_table(table.shape[1], table.shape[2], table.device, table.dtype))

    def set_backend(self, backend: str) -> None:
        """Use ``backend`` for every op in the model from now on; see :mod:`t2t_fast.dispatch`."""
        check_backend(backend)
        module: Any
        for module in self.modules():
            if hasattr(module, "backend"):
                module.backend = backend

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters to which optimizers apply no weight decay."""
        return {"cls_token", "pos_embed"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups: the stem, and one group per block."""
        return {
            "stem": r"^cls_token|pos_embed|tokens_to_token",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in backward instead of keeping their activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The head: a Linear, or an Identity where ``num_classes`` is 0."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a freshly initialised one of ``num_classes`` outputs (0: none).

        The new head has the model's device, dtype and training mode. ``global_pool=None`` keeps the pooling.

        Raises:
            TypeError: ``num_classes`` is not an integer.
            ValueError: ``num_classes`` is negative, or ``global_pool`` unknown.
        """
        num_classes = check_count("num_classes", num_classes, 0)
        if global_pool is not None:
            self.global_pool = _check_global_pool(global_pool)
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes > 0:
            like = self.cls_token
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            _init_linear(self.head)
        self.head.train(self.training)

    def set_input_size(
        self, img_size: int | Sequence[int] | None = None, patch_size: int | Sequence[int] | None = None
    ) -> None:
        """Rebuild for images of ``img_size``: the position table is interpolated to the new grid.

        Args:
            img_size: Height and width in pixels; None keeps them.
            patch_size: For timm's interface; must be 16, the pixels between a T2T-ViT's tokens.

        Raises:
            TypeError: An argument is neither an int nor a pair of ints.
            ValueError: ``img_size`` is below 16, or ``patch_size`` not 16.
        """
        if patch_size is not None and as_pair("patch_size", patch_size, 1) != (16, 16):
            raise ValueError(
                f"patch_size must be 16, the steps of the soft splits (4, 2, 2) in all, got {patch_size!r}"
            )
        if img_size is not None:
            self.img_size = as_pair("img_size", img_size, 16)
            grid = self.tokens_to_token.grids(*self.img_size)[2]
            table = resize_table(self.pos_embed.detach(), self.grid_size, grid)
            self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
            self.grid_size = grid
        if update_model_input_size is not None:
            update_model_input_size(self, self.img_size)

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse ``torch.jit.script``, which calls this first."""
        raise RuntimeError(
            f"torch.jit.script is not supported by {type(self).__name__}; use torch.jit.trace, torch.export or "
            "t2t_fast.export"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}  # copies and pickles start with an empty cache

    def load_pretrained(self, checkpoint_path: str, prefix: str = "") -> None:
        """Load a checkpoint file of any known layout; timm calls this for ``pretrained=True`` and ``.npz`` files."""
        cfg = getattr(self, "pretrained_cfg", None) or {}
        # The configuration knows the image size of a released file, not that of a user's own.
        own_file = cfg.get("file") or str(checkpoint_path).endswith(".npz")
        load_checkpoint(checkpoint_path, self, grid_size=None if own_file else grid_of_config(cfg))

    def _embed(self, x: Tensor) -> Tensor:
        tokens = self.tokens_to_token(x)
        grid = self.tokens_to_token.grids(x.shape[2], x.shape[3])[2]
        tokens = torch.cat((self.cls_token.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens), dim=1)
        table = table_for_grid(self.pos_embed, self.grid_size, grid, self.dynamic_img_size, self._tables)
        return self.pos_drop(tokens + table)

    def _run_block(self, block: nn.Module, x: Tensor, *num_tokens: int) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled() and not torch.jit.is_scripting():
            if torch.compiler.is_compiling():  # the backend is chosen while the graph is traced
                return checkpoint(block, x, *num_tokens)
            # Backward recomputes the block, outside of a use_backend context that is active now.
            return checkpoint(partial(_run_with_backend, resolve_backend(), block), x, *num_tokens)
        return block(x, *num_tokens)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to normalised tokens (B, 1 + h*w, num_features), cls token first."""
        x = self._embed(x)
        for block in self.blocks:
            x = self._run_block(block, x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens of :meth:`forward_features` to logits (B, num_classes), or to the pooled features."""
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(dim=1)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes).

        The logits may need one token of the last block: then it computes the others as far as this one needs them.
        """
        if not may_run_cls_alone(self, _METHODS, x):
            return self.forward_head(self.forward_features(x))
        x = self._embed(x)
        for i in range(len(self.blocks) - 1):
            x = self._run_block(self.blocks[i], x)
        last = self.blocks[-1]
        reason = why_not_cls_alone(self, last, x)
        if is_explaining():
            note(f"last block: {'for the cls token alone' if reason is None else f'for all tokens: {reason}'}")
        x = self._run_block(last, x, *(() if reason else (1,)))
        return self.forward_head(self.norm(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Features after chosen blocks, for detection, segmentation and pictures.

        Args:
            x: Images (B, in_chans, H, W).
            indices: Which blocks: the last n for an int n, those in a list, all for None.
            return_prefix_tokens: Return each feature as a pair with its cls token (B, 1, C).
            norm: Apply the last LayerNorm to each feature; its width must fit.
            stop_early: Do not run the blocks after the last of ``indices``.
            output_fmt: ``"NCHW"`` for maps (B, C, h, w), ``"NLC"`` for tokens (B, h*w, C).
            intermediates_only: Return the features alone.

        Returns:
            The list of features, or ``(tokens of forward_features, features)``.

        Raises:
            ValueError: Unknown ``output_fmt``, or ``norm`` with features of another width.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r} is unknown; accepted: NCHW, NLC")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        widths = {self.feature_info[i]["num_chs"] for i in take_indices}
        if norm and widths != {self.num_features}:
            raise ValueError(f"norm=True needs features of {self.num_features} channels, got {sorted(widths)}")
        images = x
        x = self._embed(images)
        height, width = self.tokens_to_token.grids(*images.shape[2:])[2]
        features: list[Any] = []
        blocks = self.blocks if torch.jit.is_scripting() or not stop_early else self.blocks[: max_index + 1]
        for i, block in enumerate(blocks):
            x = self._run_block(block, x)
            if i in take_indices:
                y = self.norm(x) if norm else x
                prefix, y = y[:, : self.num_prefix_tokens], y[:, self.num_prefix_tokens :]
                if output_fmt == "NCHW":
                    y = y.transpose(1, 2).unflatten(2, (height, width)).contiguous()
                features.append((y, prefix) if return_prefix_tokens else y)
        if intermediates_only:
            return features
        return (x if stop_early and max_index + 1 < len(self.blocks) else self.norm(x)), features

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove everything that the features at ``indices`` do not need; return the indices of their blocks.

        The last LayerNorm is removed too if the remaining features have another width.
        """
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        width = self._block_widths()[max_index]
        if prune_norm or width != self.num_features:
            self.norm = nn.Identity()
        self.num_features = self.head_hidden_size = width
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices


# Of the class as it was written: whoever overrides or replaces one of them gets it called.
_METHODS = {name: getattr(T2TViT, name) for name in ("_embed", "_run_block", "forward_features", "forward_head")}


def _check_global_pool(global_pool: str) -> str:
    if not isinstance(global_pool, str):
        raise TypeError(f"global_pool must be a str, got {global_pool!r}")
    if global_pool not in GLOBAL_POOLS:
        raise ValueError(f"global_pool={global_pool!r} is unknown; accepted: {', '.join(map(repr, GLOBAL_POOLS))}")
    return global_pool


def _find_norm_layer(norm_layer: Callable[..., nn.Module] | str | None) -> Callable[..., nn.Module]:
    if norm_layer is None:
        return nn.LayerNorm
    if isinstance(norm_layer, str):
        name = norm_layer.replace("_", "").lower()  # as timm reads it
        if name == "layernorm":
            return nn.LayerNorm
        try:
            return get_norm_layer(name) or nn.LayerNorm
        except KeyError:
            raise ValueError(f"norm_layer={norm_layer!r} is no name that timm.layers.get_norm_layer knows") from None
    if not callable(norm_layer):
        raise TypeError(f"norm_layer must be a callable or a name, got {norm_layer!r}")
    return norm_layer


def _children_first(module: nn.Module) -> Iterator[nn.Module]:
    """Every module, in the order of construction."""
    for child in module.children():
        yield from _children_first(child)
    yield module


@torch.no_grad()
def _truncated_normal_(tensor: Tensor) -> None:
    """Fill with a normal distribution of deviation 0.02, truncated at six deviations, drawn in float32 or better.

    timm draws uniform numbers and maps -1 to a far outlier. Rounding yields -1 once in 2**24 numbers in float32, and
    often in 16 bits; the truncation bounds it.
    """
    drawn = torch.empty_like(tensor, dtype=compute_dtype(tensor))
    tensor.copy_(trunc_normal_(drawn, std=0.02, a=-0.12, b=0.12))


def _init_linear(linear: nn.Linear) -> None:
    _truncated_normal_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def _run_with_backend(backend: str, block: nn.Module, x: Tensor, *num_tokens: int) -> Tensor:
    with use_backend(backend):
        return block(x, *num_tokens)


def _record_grid(module: nn.Module, state_dict: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
    """Record the position table's grid in the metadata of ``state_dict()``, which torch.save and copies keep."""
    local_metadata[GRID_KEY] = module.grid_size


def adapt_for_loading(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """timm's filter for pretrained weights: official names, fitted to ``model``.

    The caller reports missing entries.
    """
    found = find_weights(state_dict, use_ema=True)
    official, _ = to_official({bare: found.tensors[name] for name, bare in found.names.items()})
    check_entries(official)
    grid = found.grid or grid_of_config(getattr(model, "pretrained_cfg", None))
    adapted, notes = adapt_state_dict(official, model, grid)
    log_notes((*found.notes, *notes), type(model).__name__)
    return {name: value for name, value in adapted.items() if name in official}
