"""Weights in and out: read any published T2T-ViT checkpoint, recognise its model, fit it to another one, save it.

Nothing in a file is ever executed: pickles go through ``torch.load(weights_only=True)``, NumPy archives are read with
``allow_pickle=False``. Parameter names are the official ones everywhere behind :func:`read_checkpoint`; see
:mod:`t2t_fast.models.layouts` for the others.
"""

from __future__ import annotations

import argparse
import errno
import io
import logging
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from ..files import check_target, write_bytes
from .adapt import LoudNote, adapt_state_dict
from .architecture import describe_mismatch, infer_architecture, lookalikes, require_t2t_vit, some
from .layouts import CheckpointError, from_official, to_official

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

_EMA_CONTAINERS = ("state_dict_ema", "model_ema")
_CONTAINERS = ("state_dict", "model")
_SUFFIXES = (".pth", ".pth.tar", ".pt", ".safetensors", ".npz")


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a file.

    Attributes:
        path: The file.
        state_dict: Official names to CPU tensors, dtypes as in the file.
        layout: The layout of the file, one of :data:`t2t_fast.models.layouts.LAYOUTS`.
        source: The container the weights were in: ``"state_dict_ema"``, ``"model_ema"``, ``"state_dict"``,
            ``"model"``, or ``"bare"`` for a file that is itself the state dict.
        notes: What a user should know about the choice made.
    """

    path: Path
    state_dict: dict[str, Tensor]
    layout: str
    source: str
    notes: tuple[str, ...] = ()


def read_checkpoint(path: str | os.PathLike[str], use_ema: bool = True) -> Checkpoint:
    """Read the weights of a T2T-ViT from a file, whichever project wrote it, without executing anything in it.

    Args:
        path: A file by ``torch.save`` (``.pth``, ``.pth.tar``, ``.pt``, ...), ``.safetensors`` or ``.npz``.
        use_ema: Prefer the averaged weights where the file has both.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file cannot be read, needs code to be executed, or holds no T2T-ViT.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "no such checkpoint file", str(path))
    if path.is_dir():
        raise CheckpointError(f"{path}: is a directory, not a checkpoint file")
    content = _read_file(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dictionary of weights")
    weights, source, notes = _pick_weights(content, use_ema)
    try:
        state_dict, layout = to_official(weights)
        require_t2t_vit(state_dict, found=[str(name) for name in weights or content])
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Checkpoint(path, state_dict, layout, source, tuple(notes))


def load_checkpoint(
    path: str | os.PathLike[str], model: nn.Module | None = None, *, use_ema: bool = True, strict: bool = True
) -> dict[str, Tensor]:
    """Read a checkpoint and, given a model, fit its weights to the model and load them.

    Args:
        path: See :func:`read_checkpoint`.
        model: A T2T-ViT of this library, or None only to read.
        use_ema: Prefer the averaged weights where the file has both.
        strict: Insist that the names of file and model agree.

    Returns:
        The (adapted) state dict with official names. Notes go to the logger ``t2t_fast``.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file holds no T2T-ViT, or one that does not fit the model.
    """
    checkpoint = read_checkpoint(path, use_ema)
    log_notes(checkpoint.notes, path)
    if model is None:
        return checkpoint.state_dict
    try:
        adapted, notes = adapt_state_dict(checkpoint.state_dict, model)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    try:
        model.load_state_dict(adapted, strict=strict)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: {describe_mismatch(adapted, model.state_dict()) or error}") from error
    log_notes(notes, path)
    return adapted


def log_notes(notes: Iterable[str], origin: object) -> None:
    """Log notes about ``origin`` to ``t2t_fast``: a :class:`LoudNote` as a warning, others for information."""
    for note in notes:
        _logger.log(logging.WARNING if isinstance(note, LoudNote) else logging.INFO, "%s: %s", origin, note)


def save_checkpoint(state_dict: Mapping[str, Tensor], path: str | os.PathLike[str], layout: str = "official") -> None:
    """Write weights to a file, whole or not at all.

    Args:
        state_dict: Official names to tensors.
        path: ``.pth``, ``.pth.tar`` or ``.pt`` (a dictionary with the one entry ``state_dict``), ``.safetensors`` or
            ``.npz``. An existing file is replaced once the new one is complete.
        layout: ``"official"``, ``"mmpretrain"`` or ``"paddlevit"``.

    Symbolic links are followed; a device or FIFO is written to directly.

    Raises:
        LayoutError: The project of ``layout`` has no such model.
        CheckpointError: Unknown suffix, or a tensor that the format cannot hold.
        TypeError: An entry of ``state_dict`` is no tensor.
        OSError: The file cannot be written (``filename`` is ``path``); the old one is untouched.
    """
    check_checkpoint_target(path)
    tensors = from_official({name: _storable(name, value) for name, value in state_dict.items()}, layout)
    tensors = {name: value.contiguous() for name, value in tensors.items()}  # those of PaddleViT are transposed
    try:
        data = _serialise(tensors, Path(path).suffix)
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


def _serialise(tensors: dict[str, Tensor], suffix: str) -> bytes:
    """The file's content. In memory, for what the libraries raise on a full disk is not always an ``OSError``."""
    if suffix == ".safetensors":
        return safetensors.torch.save(tensors, metadata={"format": "pt"})
    buffer = io.BytesIO()
    if suffix == ".npz":
        # NumPy has neither bfloat16 nor float8; float32 holds their every value.
        known = (torch.float16, torch.float32, torch.float64)
        arrays = {
            k: (v.float() if v.is_floating_point() and v.dtype not in known else v).numpy() for k, v in tensors.items()
        }
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
    else:
        torch.save({"state_dict": tensors}, buffer)
    return buffer.getvalue()


class _Inert:
    """Stands in for objects beside the weights (a metric as a NumPy scalar): takes any state, does nothing with it."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# What the official files and old timm ones hold beside tensors. The NumPy names are given to the stand-in, so that
# no constructor of NumPy sees data from the file.
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    (_Inert, "numpy.core.multiarray.scalar"),
    (_Inert, "numpy._core.multiarray.scalar"),
    (_Inert, "numpy.dtype"),
]


def _read_file(path: Path) -> Any:
    if path.suffix == ".npy":
        raise CheckpointError(f"{path}: an .npy file is one array without a name; expected .npz, with all of them")
    if path.suffix == ".pdparams":
        raise CheckpointError(
            f"{path}: is a PaddlePaddle pickle, which is not executed here; write an .npz with PaddlePaddle: "
            f"numpy.savez('weights.npz', **{{k: v.numpy() for k, v in paddle.load({path.name!r}).items()}})"
        )
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # the readers raise anything on a damaged file, a bare KeyError included
        names = _unsafe_globals(path) if isinstance(error, pickle.UnpicklingError) else []
        names = names or re.findall(r"GLOBAL (\S+)", str(error))
        if names:
            raise CheckpointError(
                f"{path}: needs {', '.join(sorted(set(names)))}, which is code, not data, and was not executed; if you "
                "trust the file, load it with torch.load(..., weights_only=False) and save its state dict again"
            ) from error
        raise CheckpointError(f"{path}: cannot be read as a checkpoint: {_guess_content(path, error)}") from error


def _unsafe_globals(path: Path) -> list[str]:
    try:
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # files of torch before 1.6 are not archives and cannot be listed
        return []


def _guess_content(path: Path, error: Exception) -> str:
    with open(path, "rb") as file:
        start = file.read(256)
    if not start:
        return "the file is empty"
    if start.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return "it is an HTML page, so the download must have gone wrong"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself"
    if b"Object arrays cannot be loaded" in str(error).encode():
        return "it holds pickled objects, which were not executed"
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
        return "it is a text file"
    return f"it is truncated, damaged or of another kind ({type(error).__name__})"


def _pick_weights(content: Mapping[str, Any], use_ema: bool) -> tuple[dict[str, Any], str, list[str]]:
    """The tensors of the preferred container, the name of the container, and notes."""
    order = (*_EMA_CONTAINERS, *_CONTAINERS) if use_ema else (*_CONTAINERS, *_EMA_CONTAINERS)
    present = [key for key in order if isinstance(content.get(key), Mapping) and content[key]]
    source = present[0] if present else "bare"
    chosen = content[source] if present else content
    notes = []
    if len(present) > 1:
        notes.append(f"took the weights in {source}, left those in {', '.join(present[1:])}")
    if not use_ema and source in _EMA_CONTAINERS:
        notes.append(f"took the averaged weights in {source}: the file has no others")
    if "ema_state_dict" in content:
        notes.append("took the weights in state_dict, where mmengine saves the averaged ones")
    weights = {k: v for k, v in chosen.items() if isinstance(k, str) and isinstance(v, (Tensor, np.ndarray))}
    ignored = [str(key) for key in chosen if key not in weights]
    if weights and ignored:
        notes.append(f"ignored what is not a tensor: {some(ignored)}")
    return {k: v.detach() if isinstance(v, Tensor) else v for k, v in weights.items()}, source, notes
