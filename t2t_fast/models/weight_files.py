"""Read files and folders of weights, recognised by content: pickles, safetensors, NumPy archives, shards."""

from __future__ import annotations

import errno
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch

from ..files import require_regular
from .layouts import CheckpointError, some
from .pickles import PickledCode, StandIn, load_pickle

GRID_KEY = "grid_size"  # in our files: height and width of the position table's grid, in tokens
_INDEX_SUFFIX = ".index.json"
_SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".bin", ".tar")
_FOLDER_FILES = ("model.safetensors", "pytorch_model.bin", "model.pth", "model.pt")


@dataclass(frozen=True)
class WeightFile:
    """The content of a file or folder.

    Attributes:
        content: Names to tensors, or a trainer's dictionary around them.
        grid: The position table's grid as recorded beside the weights, unchecked; None if it is not recorded.
        config: The content of the folder's ``config.json``; empty for a file.
    """

    content: Any
    grid: Any = None
    config: Mapping[str, Any] = field(default_factory=dict)


def read_weight_file(path: Path) -> WeightFile:
    """Read a file by torch.save, safetensors or numpy.savez, an index of shards, or a folder with one of these.

    The content decides which kind it is; the suffix does where the content is ambiguous.

    Raises:
        OSError: There is no such file, it may not be read, or it is a device or FIFO.
        CheckpointError: The file is damaged, of another kind, or needs code to be executed.
    """
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "no such checkpoint file", str(path))
    if path.is_dir():
        return _read_folder(path)
    require_regular(path)
    if path.name.endswith(_INDEX_SUFFIX):
        return _read_shards(path)
    try:
        file = _READERS[_kind_of(path)](path)
    except PermissionError:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except PickledCode as error:
        raise CheckpointError(
            f"{path}: needs {', '.join(sorted(error.args))}, which is code, not data, and was not executed; if you "
            "trust the file, load it with torch.load(..., weights_only=False) and save its state dict again"
        ) from error
    except Exception as error:  # the readers raise anything on a damaged file, a bare KeyError included
        raise CheckpointError(f"{path}: cannot be read as a checkpoint: {_guess_content(path, error)}") from error
    if not isinstance(file.content, Mapping):
        kind = type(file.content).__name__
        if isinstance(file.content, StandIn):
            raise CheckpointError(f"{path}: holds a pickled {kind}, not weights; save its state_dict() instead")
        raise CheckpointError(f"{path}: holds a {kind}, not a dictionary of weights")
    return file


def _kind_of(path: Path) -> str:
    if path.suffix == ".pdparams":
        raise CheckpointError(
            "is a PaddlePaddle pickle, which is not executed here; write an .npz with PaddlePaddle: "
            f"numpy.savez('weights.npz', **{{k: v.numpy() for k, v in paddle.load({path.name!r}).items()}})"
        )
    with open(path, "rb") as file:
        start = file.read(9)
    if start.startswith(b"\x93NUMPY") or path.suffix == ".npy":
        raise CheckpointError("an .npy file is one array without a name; expected .npz, with all of them")
    if start.startswith(b"PK") and zipfile.is_zipfile(path):
        names = zipfile.ZipFile(path).namelist()
        if any(name.endswith(".npy") for name in names):
            return "npz"
        if not any(name.endswith("data.pkl") for name in names):
            raise CheckpointError("is a ZIP archive that holds no weights")
        return "pickle"
    header_size = int.from_bytes(start[:8], "little")
    if start[8:] == b"{" and header_size <= path.stat().st_size - 8:
        return "safetensors"
    return {".safetensors": "safetensors", ".npz": "npz"}.get(path.suffix.lower(), "pickle")


def _read_safetensors(path: Path) -> WeightFile:
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    try:
        content = safetensors.torch.load_file(path)
    except UnicodeEncodeError:  # safetensors cannot open a path that is not UTF-8
        content = safetensors.torch.load(path.read_bytes())
    height, _, width = str(header.get("__metadata__", {}).get(GRID_KEY)).partition("x")
    grid = (int(height), int(width)) if height.isdecimal() and width.isdecimal() and len(height + width) < 20 else None
    return WeightFile(content, grid)


def _read_npz(path: Path) -> WeightFile:
    with np.load(path, allow_pickle=False) as archive:
        content = {name: archive[name] for name in archive.files}
    grid = content.pop(GRID_KEY, None)
    return WeightFile(content, None if grid is None else grid.tolist())


def _read_pickle(path: Path) -> WeightFile:
    content = load_pickle(path)
    return WeightFile(content, content.get(GRID_KEY) if isinstance(content, Mapping) else None)


_READERS = {"safetensors": _read_safetensors, "npz": _read_npz, "pickle": _read_pickle}


def _read_folder(folder: Path) -> WeightFile:
    """Read a folder by ``save_pretrained`` or timm, or one with a single file of weights."""
    indices = sorted(folder.glob(f"*{_INDEX_SUFFIX}"))
    names = [folder / name for name in _FOLDER_FILES if (folder / name).is_file()]
    single = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in _SUFFIXES and path.is_file()]
    chosen = indices or names or (single if len(single) == 1 else [])
    if not chosen:
        expected = f"an index (*{_INDEX_SUFFIX}), {', '.join(_FOLDER_FILES)} or a single {', '.join(_SUFFIXES)}"
        raise CheckpointError(f"{folder}: is a directory without weights; expected {expected}")
    file = read_weight_file(chosen[0])
    return WeightFile(file.content, file.grid, _read_json(folder / "config.json"))


def _read_shards(index: Path) -> WeightFile:
    """Merge the files that an index names."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: is no index of weights: expected a JSON object with 'weight_map'")
    content: dict[str, Any] = {}
    grid = None
    for name in sorted(set(weight_map.values())):
        shard = index.parent / name
        if Path(name).name != name or name.endswith(_INDEX_SUFFIX) or not _is_file(shard):
            raise CheckpointError(f"{index}: names the file {some([name])}, which is no file of weights in its folder")
        file = read_weight_file(shard)
        grid = grid or file.grid
        content.update({key: value for key, value in file.content.items() if weight_map.get(key) == name})
    missing = [key for key in weight_map if key not in content]
    if missing:
        raise CheckpointError(f"{index}: names {some(missing[:1])}, which is not in {weight_map[missing[0]]}")
    return WeightFile(content, grid)


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one if there is no such file."""
    if not _is_file(path):
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a JSON object")
    return content


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than any file's
        return False


def _guess_content(path: Path, error: Exception) -> str:
    with open(path, "rb") as file:
        start = file.read(256)
        size = os.fstat(file.fileno()).st_size
    if not size:
        return "the file is empty"
    if start.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return "it is an HTML page, so the download must have gone wrong"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself"
    if b"Object arrays cannot be loaded" in str(error).encode():
        return "it holds pickled objects, which were not executed"
    if "persistent_load of storage" in str(error):
        return "beside the weights it holds a pickled module in the format of torch before 1.6, which is not read"
    if "Unsupported operand" in str(error) and start.startswith((b"PK", b"\x80")):
        return "its pickle protocol is not torch.save's own (2), and only that is read without executing anything"
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
        return "it is a text file"
    return f"it is truncated, damaged or of another kind ({type(error).__name__})"
