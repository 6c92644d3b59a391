"""Read pickled checkpoints as data: tensors and plain containers are loaded, every other object becomes a stand-in.

``torch.load(weights_only=True)`` reads the file, so nothing in it is executed. Alone, it refuses files that hold
anything but tensors and plain containers. Trainers save more: metrics, paths, configurations, random states. So each
class or function that a file names is replaced by a class of ours that takes any arguments and does nothing.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch


class PickledCode(Exception):
    """A pickle names functions that run code, such as ``os.system``; ``args`` are the names."""


class StandIn:
    """Replaces an object of any other class: takes any arguments and any state, and does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> Any:
        return object.__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _DictStandIn:
    """Replaces a subclass of dict, whose entries may be the weights: makes an OrderedDict."""

    def __new__(cls, *args: object) -> Any:
        return OrderedDict()


class _ListStandIn:
    """Replaces a subclass of list, or a deque: makes a list."""

    def __new__(cls, *args: object) -> Any:
        return []


_DICTS = ("collections.defaultdict",)
_LISTS = ("collections.deque",)
# Stand-ins for these would also be harmless. They are refused all the same: a checkpoint that names them is suspicious.
_CODE = re.compile(
    r"(os|nt|posix|sys|subprocess|_posixsubprocess|shutil|pty|runpy|importlib|imp|ctypes|_ctypes|code|codeop|marshal|pickle"
    r"|_pickle|socket|_socket|webbrowser|multiprocessing|asyncio|threading|_thread|gc|urllib|http\.client|ftplib|smtplib)"
    r"(\..+)|_?io\.open|builtins\.(eval|exec|compile|open|__import__|input|breakpoint|exit|quit|globals|setattr|delattr)"
)
_MAX_NAMES = 1000


def load_pickle(path: Path) -> Any:
    """Read a file by ``torch.save``, in its zip format or the one before, onto the CPU.

    Raises:
        PickledCode: The file names functions that run code.
        Exception: Anything that ``torch.load`` raises on a damaged file.
    """
    stand_ins: dict[str, type] = {}
    _add(stand_ins, _unknown_names(path))
    while True:
        known: list[Any] = [(kind, name) for name, kind in stand_ins.items()]
        try:
            # Pass the open file: given a path, torch trusts the suffix.
            with torch.serialization.safe_globals(known), open(path, "rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            # Each round adds a stand-in, or makes one a dict or a list, so the loop ends.
            if len(stand_ins) > _MAX_NAMES or not _learn(stand_ins, str(error)):
                raise


def _unknown_names(path: Path) -> list[str]:
    try:
        with open(path, "rb") as file:
            return torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # files of torch before 1.6 are not archives: load_pickle learns their names one by one
        return []


def _learn(stand_ins: dict[str, type], message: str) -> bool:
    """Add the stand-in that ``message`` of torch misses; returns whether there was one to add."""
    for pattern, base in ((r"Can only SETITEMS? for dict", _DictStandIn), (r"Can only append to lists", _ListStandIn)):
        found = re.search(pattern + r".*got <class 'stand_in\.([^']+)'>", message, re.DOTALL)
        if found and not issubclass(stand_ins[found[1]], base):
            stand_ins[found[1]] = _stand_in(found[1], base)
            return True
    unknown = re.search(r"GLOBAL (\S+)", message)
    if not unknown or unknown[1] in stand_ins:
        return False
    _add(stand_ins, [unknown[1]])
    return True


def _add(stand_ins: dict[str, type], names: list[str]) -> None:
    names = [name if "." in name else f"builtins.{name}" for name in names]  # torch omits `builtins`
    refused = [name for name in names if _CODE.fullmatch(name)]
    if refused:
        raise PickledCode(*refused)
    for name in names:
        base = _DictStandIn if name in _DICTS else _ListStandIn if name in _LISTS else StandIn
        stand_ins.setdefault(name, _stand_in(name, base))


def _stand_in(name: str, base: type) -> type:
    """A new class with the name of the class that it replaces, so that messages can show it."""
    return type(name, (base,), {"__module__": "stand_in"})
