"""Checkpoints: read any published T2T-ViT, recognise its model, fit the weights to another model, and save them.

Nothing in a file is executed: pickles are read with ``torch.load(weights_only=True)``, NumPy archives with
``allow_pickle=False``. :func:`read_checkpoint` returns the official parameter names; for other layouts of names see
:mod:`t2t_fast.models.layouts`.
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
        source: The dictionary in the file that held the weights, such as ``"state_dict_ema"``; ``"bare"`` if the file
            itself is the state dict.
        notes: What a user should know about the choice of ``source``.
        grid_size: Height and width of the position table's grid, in tokens; None if the file does not record them.
        config: The content of ``config.json`` in a folder; empty for a file.
    """

    path: Path
    state_dict: dict[str, Tensor]
    layout: str
    source: str
    notes: tuple[str, ...] = ()
    grid_size: tuple[int, int] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


def read_checkpoint(path: str | os.PathLike[str], use_ema: bool = True) -> Checkpoint:
    """Read the weights of a T2T-ViT from a file of any project, without executing anything in it.

    Args:
        path: A file by ``torch.save``, safetensors or ``numpy.savez`` (recognised by content, not by suffix); an index
            of shards (``*.index.json``); or a folder with one of these, and possibly a ``config.json``.
        use_ema: Prefer the averaged weights if the file has both.

    Raises:
        OSError: There is no such file, it may not be read, or it is a device or FIFO.
        ValueError: ``path`` is empty.
        CheckpointError: The file cannot be read, needs code to be executed, or holds no T2T-ViT, or several.
    """
    path = _as_path(path)
    file = read_weight_file(path)
    return _translate(path, file, _find(path, file, use_ema))


def _as_path(path: str | os.PathLike[str]) -> Path:
    if not os.fspath(path):  # Path("") is the working directory
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
        grid = None  # it describes another state of the model
    return Checkpoint(path, state_dict, layout, found.source, found.notes + found.ignored, grid, file.config)


def grid_of_config(pretrained_cfg: Any) -> tuple[int, int] | None:
    """The grid that the input size in timm's ``pretrained_cfg`` gives; None without an input size."""
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

    Weights with exactly the model's names and shapes are loaded unchanged, even if the model's head or other modules
    were replaced. Other weights get the official names and are fitted by :func:`adapt_state_dict`.

    Args:
        path: As for :func:`read_checkpoint`; or a dictionary: a state dict, or a trainer's dictionary around it.
        model: A T2T-ViT of this library, also inside DataParallel or ``torch.compile``; None only reads.
        use_ema: Prefer the averaged weights if the file has both.
        strict: Require file and model to have the same names.
        grid_size: Height and width of the file's position table, in tokens. Needed to resize a table of a grid that is
            not square, if the file does not record its grid; files by this library record it.

    Returns:
        The state dict as loaded. Its names are the official ones, or the model's own where the file had those. Notes
        go to the logger ``t2t_fast``.

    Raises:
        OSError: There is no such file, it may not be read, or it is a device or FIFO.
        ValueError: ``path`` is empty.
        CheckpointError: The file holds no T2T-ViT, or one that does not fit the model.
        TypeError: ``model`` is not a T2T-ViT of this library and has other names than the file; or ``grid_size`` is no
            pair.
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
    """Fit the weights of a checkpoint to a model and load them, as :func:`load_checkpoint` does after reading."""
    path = checkpoint.path
    log_notes(checkpoint.notes, path)
    inner = t2t_vit_inside(model)
    if inner is None:
        raise TypeError(
            f"model must be a T2T-ViT of this library, or have the very names and shapes of {path}; got "
            f"{type(model).__name__}"
        )
    own_names = {unwrapped(name): name for name in inner.state_dict()}  # compiled blocks have longer names
    try:
        adapted, notes = adapt_state_dict(checkpoint.state_dict, inner, checkpoint.grid_size or grid_size)
        _check_fit(adapted, inner, strict)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    inner.load_state_dict({own_names.get(name, name): value for name, value in adapted.items()}, strict=strict)
    log_notes(notes, path)
    return adapted


def _check_fit(adapted: Mapping[str, Any], model: nn.Module, strict: bool) -> None:
    """Raise unless ``load_state_dict`` would take all of ``adapted``, so that a refused file changes nothing."""
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
    """Whether names, shapes and kinds of values (float, integer, quantised) are the model's own."""
    own = model.state_dict()
    return entries.keys() == own.keys() and all(_is_alike(given, own[name]) for name, given in entries.items())


def _fit_own(
    found: FoundWeights, model: nn.Module, grid_size: tuple[int, int] | None
) -> tuple[dict[str, Any], list[str]]:
    """The entries, which have the model's names and shapes; the position table resized if its grid is another one."""
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
    """Log notes about ``origin`` to the logger ``t2t_fast``: each :class:`LoudNote` as a warning, others as info."""
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
        grid_size: Height and width of the position table's grid, in tokens, to record beside the weights. None takes
            the grid that ``T2TViT.state_dict()`` carries in its metadata.

    Symbolic links are followed; a device or FIFO is written to directly.

    Raises:
        LayoutError: ``layout`` cannot express this model.
        CheckpointError: Unknown suffix, or a tensor that the format cannot hold.
        TypeError: ``state_dict`` is not a mapping, or one of its entries not a tensor.
        OSError: The file cannot be written (``filename`` is ``path``); the old one is untouched.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping of names to tensors, got {type(state_dict).__name__}")
    check_checkpoint_target(path)
    tensors = from_official({name: _storable(name, value) for name, value in state_dict.items()}, layout)
    tensors = {name: value.contiguous() for name, value in tensors.items()}  # PaddleViT's are transposed views
    try:
        data = _serialise(tensors, Path(path).suffix, as_grid(grid_size) or recorded_grid(state_dict))
    except (KeyError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:  # an unknown dtype
        dtypes = ", ".join(sorted({str(value.dtype) for value in tensors.values()}))
        raise CheckpointError(
            f"path={str(path)!r}: the format cannot hold these tensors ({dtypes}): {error}"
        ) from error
    write_bytes(path, data)


def check_checkpoint_target(path: str | os.PathLike[str]) -> None:
    """Check, before the work is done, that :func:`save_checkpoint` can write to ``path``.

    Raises:
        CheckpointError: Unknown suffix.
        OSError: The file cannot be written.
    """
    if not Path(path).name.endswith(_SUFFIXES):
        raise CheckpointError(f"path={str(path)!r} must end in .pth, .pth.tar, .pt, .safetensors or .npz")
    check_target(path)


def _storable(name: str, value: Any) -> Tensor:
    """A contiguous copy on the CPU; tensors that share memory become separate ones."""
    if not isinstance(value, Tensor):
        raise TypeError(f"state_dict[{name!r}] must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        kind = "on the meta device" if value.is_meta else "quantised" if value.is_quantized else str(value.layout)
        raise CheckpointError(f"state_dict[{name!r}] is {kind}; accepted: dense tensors with values")
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


def _serialise(tensors: dict[str, Tensor], suffix: str, grid: tuple[int, int] | None) -> bytes:
    """The file's content, made in memory: on a full disk the libraries do not always raise ``OSError``."""
    if suffix == ".safetensors":
        recorded = {} if grid is None else {GRID_KEY: f"{grid[0]}x{grid[1]}"}
        return safetensors.torch.save(tensors, metadata={"format": "pt", **recorded})
    buffer = io.BytesIO()
    if suffix == ".npz":
        # NumPy has neither bfloat16 nor float8; float32 holds all their values.
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
