"""Weights in and out: read any published T2T-ViT checkpoint, recognise its model, fit it to another one, save it.

Nothing in a file is ever executed: pickles go through ``torch.load(weights_only=True)``, NumPy archives are read with
``allow_pickle=False``. Parameter names are the official ones everywhere behind :func:`read_checkpoint`; see
:mod:`t2t_fast.models.layouts` for the others.
"""

from __future__ import annotations

import io
import logging
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from ..checks import FLOAT_DTYPES, as_pair
from ..files import check_target, write_bytes
from ..layers import TokensToToken
from .adapt import LoudNote, adapt_state_dict, fit_table, t2t_vit_inside
from .architecture import check_entries, describe_mismatch, infer_architecture, lookalikes, require_t2t_vit
from .containers import FoundWeights, as_grid, find_weights, recorded_grid
from .layouts import CheckpointError, from_official, to_official, unwrapped
from .weight_files import GRID_KEY, WeightFile, read_weight_file

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "LoudNote",
    "adapt_state_dict",
    "infer_architecture",
    "load_checkpoint",
    "log_notes",
    "lookalikes",
    "read_checkpoint",
    "save_checkpoint",
]

_logger = logging.getLogger("t2t_fast")

_SUFFIXES = (".pth", ".pth.tar", ".pt", ".safetensors", ".npz")


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a file.

    Attributes:
        path: The file, or the folder.
        state_dict: Official names to CPU tensors, dtypes as in the file.
        layout: The layout of the file, one of :data:`t2t_fast.models.layouts.LAYOUTS`.
        source: The container the weights were in, such as ``"state_dict_ema"`` or ``"state_dict"``, or ``"bare"`` for a
            file that is itself the state dict.
        notes: What a user should know about the choice made.
        grid_size: Height and width in tokens of the position table's grid, None where the file does not tell.
        config: The ``config.json`` of a folder, else empty.
    """

    path: Path
    state_dict: dict[str, Tensor]
    layout: str
    source: str
    notes: tuple[str, ...] = ()
    grid_size: tuple[int, int] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


def read_checkpoint(path: str | os.PathLike[str], use_ema: bool = True) -> Checkpoint:
    """Read the weights of a T2T-ViT from a file, whichever project wrote it, without executing anything in it.

    Args:
        path: A file by ``torch.save``, safetensors or ``numpy.savez`` (the content decides, not the suffix); an index
            of shards (``*.index.json``); or a folder with one of these, and perhaps a ``config.json``.
        use_ema: Prefer the averaged weights where the file has both.

    Raises:
        OSError: There is no such file, it may not be read, or it is a device or FIFO.
        ValueError: ``path`` is empty.
        CheckpointError: The file cannot be read, needs code to be executed, or holds no T2T-ViT, or several.
    """
    path = _as_path(path)
    file = read_weight_file(path)
    return _translate(path, file, _find(path, file, use_ema))


def _as_path(path: str | os.PathLike[str]) -> Path:
    if not os.fspath(path):  # which would be the working directory
        raise ValueError(f"path={path!r} is no name of a file")
    return Path(path)


def _find(path: Path, file: WeightFile, use_ema: bool) -> FoundWeights:
    try:
        return find_weights(file.content, use_ema, file.grid)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _translate(path: Path, file: WeightFile, found: FoundWeights) -> Checkpoint:
    try:
        state_dict, layout = to_official({bare: found.tensors[name] for name, bare in found.names.items()})
        check_entries(state_dict)
        require_t2t_vit(state_dict, [*found.tensors] or [str(name) for name in file.content], found.ignored)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    grid = found.grid or grid_of_config(file.config.get("pretrained_cfg"))
    if grid and "pos_embed" in state_dict and grid[0] * grid[1] + 1 != state_dict["pos_embed"].shape[1]:
        grid = None  # a note of another state of the model
    return Checkpoint(path, state_dict, layout, found.source, found.notes + found.ignored, grid, file.config)


def grid_of_config(pretrained_cfg: Any) -> tuple[int, int] | None:
    """The grid that the input size of timm's ``pretrained_cfg`` implies, None where there is none."""
    size = pretrained_cfg.get("input_size") if isinstance(pretrained_cfg, Mapping) else None
    pixels = as_grid(size[1:]) if isinstance(size, tuple | list) else None
    return TokensToToken.grids(*pixels)[2] if pixels and min(pixels) >= 16 else None


def load_checkpoint(
    path: str | os.PathLike[str] | Mapping[str, Any],
    model: nn.Module | None = None,
    *,
    use_ema: bool = True,
    strict: bool = True,
    grid_size: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """Read a checkpoint and, given a model, fit its weights to the model and load them.

    Weights whose names and shapes already are the model's own are loaded as they are, whatever the model's head and
    modules have become. Others are translated to the official names and fitted by :func:`adapt_state_dict`.

    Args:
        path: See :func:`read_checkpoint`; or what was read already: a state dict, or a trainer's dictionary around it.
        model: A T2T-ViT of this library (inside DataParallel or ``torch.compile``, too), or None only to read.
        use_ema: Prefer the averaged weights where the file has both.
        strict: Insist that the names of file and model agree.
        grid_size: Height and width in tokens of the file's position table. Needed to resize a table of a grid that is
            not square, where the file does not tell it; files by this library do.

    Returns:
        The (adapted) state dict, with official names unless the names were the model's own already. Notes go to the
        logger ``t2t_fast``.

    Raises:
        OSError: There is no such file, it may not be read, or it is a device or FIFO.
        ValueError: ``path`` is empty.
        CheckpointError: The file holds no T2T-ViT, or one that does not fit the model.
        TypeError: ``model`` is no T2T-ViT of this library, and the names are not its own; or ``grid_size`` is no pair.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or None, got {type(model).__name__}")
    if grid_size is not None:
        grid_size = as_pair("grid_size", grid_size, 1)
    if isinstance(path, Mapping):
        file = WeightFile(path, path.get(GRID_KEY))
        path = Path("state_dict")
    else:
        path = _as_path(path)
        file = read_weight_file(path)
    found = _find(path, file, use_ema)
    if model is not None and _are_own(found.entries, model):
        own, notes = _fit_own(found, model, found.grid or grid_size)
        log_notes((*found.notes, *notes), path)
        model.load_state_dict(own, strict=strict)
        return own
    checkpoint = _translate(path, file, found)
    if model is None:
        log_notes(checkpoint.notes, path)
        return checkpoint.state_dict
    return load_into(model, checkpoint, strict, grid_size)


def load_into(
    model: nn.Module, checkpoint: Checkpoint, strict: bool = True, grid_size: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Fit the weights of a checkpoint to a model and load them; as :func:`load_checkpoint`, the file being read."""
    path = checkpoint.path
    log_notes(checkpoint.notes, path)
    inner = t2t_vit_inside(model)
    if inner is None:
        raise TypeError(
            f"model must be a T2T-ViT of this library, or have the very names and shapes of {path}; got "
            f"{type(model).__name__}"
        )
    own_names = {unwrapped(name): name for name in inner.state_dict()}  # with those of compiled blocks and the like
    try:
        adapted, notes = adapt_state_dict(checkpoint.state_dict, inner, checkpoint.grid_size or grid_size)
        _check_fit(adapted, inner, strict)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    inner.load_state_dict({own_names.get(name, name): value for name, value in adapted.items()}, strict=strict)
    log_notes(notes, path)
    return adapted


def _check_fit(adapted: Mapping[str, Any], model: nn.Module, strict: bool) -> None:
    """Raise unless ``load_state_dict`` would take all of ``adapted``: a refused file changes nothing."""
    own = {unwrapped(name): value for name, value in model.state_dict().items()}
    for name, value in adapted.items():
        both = isinstance(value, Tensor) and isinstance(own.get(name), Tensor)
        if both and own[name].is_floating_point() and not value.is_floating_point():
            raise CheckpointError(f"{name} has dtype {value.dtype}, the model's {own[name].dtype}")
    kept = own if strict else {name: value for name, value in own.items() if name in adapted}
    given = adapted if strict else {name: value for name, value in adapted.items() if name in own}
    if mismatch := describe_mismatch(given, kept):
        raise CheckpointError(mismatch)


def _are_own(entries: Mapping[str, Any], model: nn.Module) -> bool:
    """Whether names, types and shapes are the model's own, and no kind of number would silently become another."""
    own = model.state_dict()
    return entries.keys() == own.keys() and all(_is_alike(given, own[name]) for name, given in entries.items())


def _fit_own(
    found: FoundWeights, model: nn.Module, grid_size: tuple[int, int] | None
) -> tuple[dict[str, Any], list[str]]:
    """Entries that are the model's own, the position table resized if it is known to be of another grid."""
    entries: Any = OrderedDict(found.entries)
    metadata = getattr(found.entries, "_metadata", None)
    if isinstance(metadata, Mapping) and all(isinstance(own, Mapping) for own in metadata.values()):
        entries._metadata = metadata  # quantised modules read it
    notes: list[str] = []
    inner = t2t_vit_inside(model)
    for name, bare in found.names.items():
        if bare == "pos_embed" and inner is not None:
            entries[name], notes = fit_table(entries[name], inner.grid_size, grid_size)
    return entries, notes


def _is_alike(given: Any, own: Any) -> bool:
    if not (isinstance(given, Tensor) and isinstance(own, Tensor)):
        return type(given) is type(own)
    same_kind = (given.is_quantized, given.layout) == (own.is_quantized, own.layout) and not given.is_meta
    both_float = given.dtype in FLOAT_DTYPES and own.dtype in FLOAT_DTYPES
    return given.shape == own.shape and same_kind and (given.dtype == own.dtype or both_float)


def log_notes(notes: Iterable[str], origin: object) -> None:
    """Log notes about ``origin`` to ``t2t_fast``: a :class:`LoudNote` as a warning, others for information."""
    for note in notes:
        _logger.log(logging.WARNING if isinstance(note, LoudNote) else logging.INFO, "%s: %s", origin, note)


def save_checkpoint(
    state_dict: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    layout: str = "official",
    grid_size: tuple[int, int] | None = None,
) -> None:
    """Write weights to a file, whole or not at all.

    Args:
        state_dict: Official names to tensors.
        path: ``.pth``, ``.pth.tar`` or ``.pt`` (a dictionary with the weights in ``state_dict``), ``.safetensors`` or
            ``.npz``. An existing file is replaced once the new one is complete.
        layout: ``"official"``, ``"mmpretrain"`` or ``"paddlevit"``.
        grid_size: Height and width in tokens of the position table's grid, recorded beside the weights. None takes what
            ``T2TViT.state_dict()`` carries with it.

    Symbolic links are followed; a device or FIFO is written to directly.

    Raises:
        LayoutError: The project of ``layout`` has no such model.
        CheckpointError: Unknown suffix, or a tensor that the format cannot hold.
        TypeError: ``state_dict`` is no mapping, or an entry of it no tensor.
        OSError: The file cannot be written (``filename`` is ``path``); the old one is untouched.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping of names to tensors, got {type(state_dict).__name__}")
    check_checkpoint_target(path)
    tensors = from_official({name: _storable(name, value) for name, value in state_dict.items()}, layout)
    tensors = {name: value.contiguous() for name, value in tensors.items()}  # those of PaddleViT are transposed
    try:
        data = _serialise(tensors, Path(path).suffix, as_grid(grid_size) or recorded_grid(state_dict))
    except (KeyError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:  # a dtype they lack
        dtypes = ", ".join(sorted({str(value.dtype) for value in tensors.values()}))
        raise CheckpointError(
            f"path={str(path)!r}: the format cannot hold these tensors ({dtypes}): {error}"
        ) from error
    write_bytes(path, data)


def check_checkpoint_target(path: str | os.PathLike[str]) -> None:
    """Find out before the work whether :func:`save_checkpoint` could write to ``path``.

    Raises:
        CheckpointError: Unknown suffix.
        OSError: The file cannot be written.
    """
    if not Path(path).name.endswith(_SUFFIXES):
        raise CheckpointError(f"path={str(path)!r} must end in .pth, .pth.tar, .pt, .safetensors or .npz")
    check_target(path)


def _storable(name: str, value: Any) -> Tensor:
    """A contiguous copy on the CPU, so that tensors which share memory become separate ones."""
    if not isinstance(value, Tensor):
        raise TypeError(f"state_dict[{name!r}] must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        kind = "on the meta device" if value.is_meta else "quantised" if value.is_quantized else str(value.layout)
        raise CheckpointError(f"state_dict[{name!r}] is {kind}; accepted: dense tensors with values")
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


def _serialise(tensors: dict[str, Tensor], suffix: str, grid: tuple[int, int] | None) -> bytes:
    """The file's content. In memory, for what the libraries raise on a full disk is not always an ``OSError``."""
    if suffix == ".safetensors":
        recorded = {} if grid is None else {GRID_KEY: f"{grid[0]}x{grid[1]}"}
        return safetensors.torch.save(tensors, metadata={"format": "pt", **recorded})
    buffer = io.BytesIO()
    if suffix == ".npz":
        # NumPy has neither bfloat16 nor float8; float32 holds their every value.
        known = (torch.float16, torch.float32, torch.float64)
        arrays = {
            k: (v.float() if v.is_floating_point() and v.dtype not in known else v).numpy() for k, v in tensors.items()
        }
        if grid is not None:
            arrays[GRID_KEY] = np.array(grid)
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
    else:
        torch.save({"state_dict": tensors, **({} if grid is None else {GRID_KEY: grid})}, buffer)
    return buffer.getvalue()
