"""timm entry points for every name in :data:`~t2t_fast.models.variants.VARIANTS`, and :func:`create_model`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any
from urllib.error import URLError

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_model_deprecations,
)
from torch import nn

from ..checks import as_pair
from .adapt import LoudNote
from .architecture import describe_mismatch, infer_architecture, lookalikes
from .checkpoints import Checkpoint, load_into, log_notes, read_checkpoint
from .layouts import CheckpointError
from .t2t_vit import T2TViT, adapt_for_loading
from .t2t_vit_dense import T2TViTDense
from .variants import VARIANTS

__all__: list[str] = []  # register_model adds the entry points


def _cfg(name: str, url: str = "", image_size: int = 224, **kwargs: Any) -> dict[str, Any]:
    convolutional = VARIANTS[name].kwargs["tokens_type"] == "convolution"
    grid = image_size // 16
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, image_size, image_size),
        "pool_size": (grid, grid),
        "fixed_input_size": True,
        "crop_pct": 0.9 if image_size == 224 else 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        # Soft splits have no convolution that timm could adapt to in_chans: our loader adapts them.
        "first_conv": "tokens_to_token.soft_split0" if convolutional else (),
        "classifier": "head",
        "custom_load": True,  # T2TViT.load_pretrained reads the file, as load_checkpoint does
        "license": "bsd-3-clause-clear",
        "paper_ids": "arXiv:2101.11986",
        **kwargs,
    }


def _default_cfgs() -> dict[str, dict[str, Any] | PretrainedCfg]:
    cfgs: dict[str, dict[str, Any] | PretrainedCfg] = {}
    for name, variant in VARIANTS.items():
        if not variant.weights:
            cfgs[name + ".untrained"] = _cfg(name)
        for tag, (_, image_size) in variant.weights.items():
            cfgs[f"{name}.{tag}"] = _cfg(name, variant.url(tag), image_size)
    return cfgs


default_cfgs = generate_default_cfgs(_default_cfgs())


def _create(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    out_indices = kwargs.pop("out_indices", 3)
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    if overlay.get("file"):  # read by T2TViT.load_pretrained, which knows more formats than timm
        kwargs["pretrained_cfg_overlay"] = {"custom_load": True, **overlay}
    if not isinstance(kwargs.get("img_size"), int | None):  # timm records it, and needs plain numbers
        kwargs["img_size"] = as_pair("img_size", kwargs["img_size"], 16)
    arguments = {**VARIANTS[name].kwargs, **kwargs}
    model_class = T2TViTDense if arguments["block_type"] == "dense" else T2TViT
    try:
        return build_model_with_cfg(
            model_class,
            name,
            pretrained,
            pretrained_filter_fn=adapt_for_loading,
            feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
            **arguments,
        )
    except (URLError, TimeoutError, ConnectionError) as error:
        tag = kwargs.get("pretrained_cfg")
        cfg = default_cfgs[name].cfgs.get(tag, default_cfgs[name].default) if isinstance(tag, str) else tag
        url = getattr(cfg or default_cfgs[name].default, "url", None)
        raise RuntimeError(
            f"the weights of {name} could not be downloaded ({error}); fetch {url} on a machine with a network and "
            "pass its path as checkpoint="
        ) from error


def _entry_point(name: str) -> Any:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{name}: keyword arguments of T2TViT; see ``t2t_fast.models.variants``."
    return register_model(create)


globals().update({name: _entry_point(name) for name in VARIANTS})
# The official code's capitalised names.
register_model_deprecations(__name__, {"T" + name[1:]: name for name in VARIANTS})


def list_models(filter: str = "*") -> list[str]:
    """Names of this package's models in natural order; ``filter`` is a shell-style pattern."""
    return [name for name in timm.list_models(filter) if name in VARIANTS]


def create_model(
    name: str | None = None,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    pretrained: bool = False,
    use_ema: bool = True,
    **kwargs: Any,
) -> nn.Module:
    """Create a T2T-ViT, optionally with the weights of a checkpoint file.

    Args:
        name: A name from :func:`list_models` (or its official spelling, ``T2t_vit_14``), optionally with a weight
            tag (``t2t_vit_14.in1k_384``). None recognises the architecture from ``checkpoint``.
        checkpoint: A file that :func:`t2t_fast.load_checkpoint` reads. If it holds a named design, arguments that are
            not given (``num_classes``, ``img_size``, ``in_chans``, ``token_dim``) come from the file. Given arguments
            win, and the head, position table and first split are adapted to them.
        pretrained: Download the official release's weights.
        use_ema: Prefer averaged weights if the file has both.
        **kwargs: As for :class:`T2TViT`, for example ``backend="auto"``.

    Returns:
        The model, in training mode as ``timm.create_model`` returns it.

    Raises:
        TypeError: ``name`` is not a string, or one of ``kwargs`` is unknown or of a wrong type.
        ValueError: Neither ``name`` nor ``checkpoint``, both ``checkpoint`` and ``pretrained``, an unknown name, or
            a file without such a model (:class:`t2t_fast.CheckpointError`).
        FileNotFoundError: There is no file ``checkpoint``.
    """
    if name is None and checkpoint is None:
        raise ValueError("create_model needs a name or checkpoint=; names: " + ", ".join(VARIANTS))
    if checkpoint is not None and pretrained:
        raise ValueError("pretrained=True and checkpoint= are two sources of weights; pass one of them")
    if name is not None:
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, got {name!r}")
        base, _, tag = name.partition(".")
        base = "t" + base[1:] if base[:1] == "T" else base
        if base not in VARIANTS:
            raise ValueError(f"name={name!r} is no T2T-ViT of this package; accepted: {', '.join(VARIANTS)}")
        if tag and tag not in default_cfgs[base].cfgs:
            known = ", ".join(f"{base}.{known}" for known in default_cfgs[base].cfgs if known)
            raise ValueError(f"name={name!r} has an unknown weight tag; accepted: {base}{known and ', '}{known}")
        name = f"{base}.{tag}" if tag else base
    found = None
    if checkpoint is not None:
        found = read_checkpoint(checkpoint, use_ema)
        name, kwargs = _complete(name, found, kwargs)
    assert name is not None
    if found is None:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    features_only = kwargs.pop("features_only", False)
    whole = {key: value for key, value in kwargs.items() if key not in ("out_indices", "feature_cls")}
    model = timm.create_model(name, **(whole if features_only else kwargs))
    load_into(model, found)
    return _cut_to_features(model, name, kwargs) if features_only else model


def _cut_to_features(model: nn.Module, name: str, kwargs: dict[str, Any]) -> nn.Module:
    """The model that ``features_only=True`` makes, with the weights of the whole model."""
    features = timm.create_model(name, features_only=True, **kwargs)
    weights = model.state_dict()
    # timm wraps the model in a module of its own, which prefixes names: model., body., graph_module.
    names = {key: key if key in weights else key.partition(".")[2] for key in features.state_dict()}
    features.load_state_dict({key: weights[own] for key, own in names.items()})
    return features


def _complete(name: str | None, checkpoint: Checkpoint, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and keyword arguments; those not given are read from a folder's ``config.json`` and from the weights."""
    try:
        inferred_name, inferred = infer_architecture(checkpoint.state_dict, checkpoint.grid_size)
    except CheckpointError as error:
        if name is None:
            raise CheckpointError(f"{checkpoint.path}: {error}") from error
        return name, kwargs  # a custom width or depth, which the arguments describe
    others = lookalikes(inferred_name)
    named = checkpoint.config.get("architecture")
    if named in (inferred_name, *others):
        inferred_name, others = str(named), ()
        inferred |= _saved_arguments(checkpoint.config)
    _check_inferred(inferred_name, inferred, checkpoint)
    if name is None and others:
        same = f"taken for {inferred_name}, but {', '.join(others)} has weights of the very same names and shapes"
        log_notes([LoudNote(f"{same}: pass the name if it is one")], checkpoint.path)
    return name or inferred_name, {**inferred, **kwargs}


def _saved_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The model's arguments in a ``config.json`` that timm or transformers wrote."""
    arguments = config.get("model_args")
    known = inspect.signature(T2TViT).parameters.keys() | inspect.signature(T2TViTDense).parameters.keys()
    saved = {key: value for key, value in arguments.items() if key in known} if isinstance(arguments, Mapping) else {}
    if "global_pool" in config:
        saved.setdefault("global_pool", config["global_pool"])
    return saved


def _check_inferred(name: str, inferred: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Raise unless the weights have the shapes of the model ``name``; allocates no memory."""
    try:
        with torch.device("meta"):
            own = _create(name, pretrained=False, **inferred).state_dict()
        given = {key: checkpoint.state_dict[key] for key in own if key in checkpoint.state_dict}
        if mismatch := describe_mismatch(given, {key: own[key] for key in given}):
            raise CheckpointError(mismatch)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
