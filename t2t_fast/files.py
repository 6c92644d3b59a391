"""Write files: a regular file completely or not at all; a device, FIFO, socket or open descriptor directly."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

StrPath = str | os.PathLike[str]

_MAX_LINKS = 40  # the kernel's own limit


def write_bytes(path: StrPath, data: bytes) -> None:
    """Write ``data`` to ``path``.

    A regular file is replaced, or created, once its content is complete and on the disk; it keeps its permissions.
    Symbolic links are followed. Everything else (``/dev/null``, a FIFO, ``/dev/stdout``, ``/dev/fd/3``) is written to
    directly.

    Raises:
        OSError: ``path`` cannot be written to; ``filename`` is ``path``. An existing file is unchanged.
        ValueError: ``path`` contains a NUL character.
    """
    if _is_direct(path):
        _write_directly(path, data)
        return
    with _replacing_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: StrPath, text: str) -> None:
    """:func:`write_bytes` of ``text`` in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def json_text(data: Any) -> str:
    """``data`` as JSON, in the format of all JSON files of this package.

    Raises:
        ValueError: ``data`` holds NaN or infinity, which JSON lacks.
    """
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


@contextlib.contextmanager
def replacing(path: StrPath) -> Iterator[Path]:
    """A context with a temporary file, empty and with the suffix of ``path``, for writers that need a path.

    At the end of the context its content is written to ``path`` as by :func:`write_bytes`; after an exception nothing
    is written. The temporary file is removed in both cases.

    Raises:
        OSError: As :func:`write_bytes`. An error inside the context that names the temporary file, or no file, names
            ``path`` instead.
        ValueError: ``path`` contains a NUL character.
    """
    if not _is_direct(path):
        with _replacing_file(path) as temporary:
            yield temporary
        return
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder, f"file{Path(path).suffix}")
        temporary.touch()
        yield temporary
        _write_directly(path, temporary.read_bytes())


@contextlib.contextmanager
def replacing_together(*paths: StrPath) -> Iterator[list[Path]]:
    """:func:`replacing` of regular files that belong together: all of them are replaced, or none.

    Old files step aside before new ones are moved, the first path comes first and returns last: whoever is killed in
    between leaves no first file, rather than files of two versions.

    Raises:
        OSError: As :func:`check_together` and :func:`write_bytes`.
        ValueError: A path contains a NUL character.
    """
    check_together(*paths)
    with contextlib.ExitStack() as stack:
        moves = [stack.enter_context(_temporary_for(path)) for path in paths]
        yield [move.temporary for move in moves]
        with errors_named(paths[0]):
            _take_places(moves)


def check_together(*paths: StrPath) -> None:
    """:func:`check_target` of regular files that belong together.

    Raises:
        OSError: As :func:`check_target`; or a path exists and is no regular file.
        ValueError: A path contains a NUL character.
    """
    for path in paths:
        if _is_direct(path):
            raise OSError(errno.EINVAL, "not a regular file, as files that belong together must be", os.fspath(path))
        _regular_target(path)


def check_target(path: StrPath) -> None:
    """Check, before the work is done and without writing, that ``path`` can be written to.

    Raises:
        OSError: It is a folder, its folder is missing, permission is missing, ...; ``filename`` is ``path``.
        ValueError: ``path`` contains a NUL character.
    """
    if not _is_direct(path):
        _regular_target(path)
        return
    descriptor = open_descriptor(path)
    with errors_named(path):
        mode = os.stat(path if descriptor is None else descriptor).st_mode
    if descriptor is None and stat.S_ISSOCK(mode):
        raise OSError(errno.ENXIO, "is a socket, which cannot be opened", os.fspath(path))


def require_regular(path: StrPath) -> None:
    """Refuse FIFOs, sockets and devices, which may block or never end when read.

    Raises:
        OSError: ``path`` exists and is neither a regular file nor a folder.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))


def open_descriptor(path: StrPath) -> int | None:
    """The open descriptor of this process that ``path`` leads to, as ``/dev/stdout`` and ``/dev/fd/3`` do on Linux."""
    name = os.fspath(path)
    for _ in range(_MAX_LINKS):
        folder, last = os.path.split(name)
        folder = os.path.realpath(folder or ".")
        if folder == f"/proc/{os.getpid()}/fd":
            return int(last) if last.isdecimal() else None
        if not os.path.islink(name):
            return None
        name = os.path.join(folder, os.readlink(name))
    return None


@contextlib.contextmanager
def errors_named(name: StrPath) -> Iterator[None]:
    """A context in which every ``OSError`` gets the file name ``name``."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(name)) from error


def _is_direct(path: StrPath) -> bool:
    """Whether ``path`` is to be written to directly: it exists and is no regular file, or is an open descriptor."""
    name = os.fspath(path)
    if "\0" in name:
        raise ValueError(f"path={name!r} contains a NUL character")
    if open_descriptor(name) is not None:
        return True
    try:
        mode = os.stat(name).st_mode
    except FileNotFoundError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _write_directly(path: StrPath, data: bytes) -> None:
    descriptor = open_descriptor(path)
    if descriptor == 1 and sys.stdout is not None:
        sys.stdout.flush()  # earlier output comes first
    with errors_named(path):
        # Opening a descriptor by name would truncate a file that the shell has opened, and fails for sockets.
        target = os.dup(descriptor) if descriptor is not None else path
        with open(target, "wb", buffering=0) as file:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]


def _regular_target(path: StrPath) -> Path:
    """The regular file, old or new, that ``path`` leads to; raises where it cannot be replaced."""
    name = os.fspath(path)
    if not name:
        raise FileNotFoundError(errno.ENOENT, "no file name", name)
    target = Path(os.path.realpath(name))
    if target.is_dir() or name.endswith(os.sep):
        raise IsADirectoryError(errno.EISDIR, "is a folder", name)
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", name)
    with errors_named(name):
        replaced = target.exists()
    for needed, mode in ((target.parent, os.W_OK | os.X_OK), *([(target, os.W_OK)] if replaced else [])):
        if not os.access(needed, mode, effective_ids=os.access in os.supports_effective_ids):
            raise PermissionError(errno.EACCES, "no permission to write there", name)
    return target


class _Move(NamedTuple):
    """A temporary file, and the file, old or new, whose place it will take."""

    temporary: Path
    target: Path


@contextlib.contextmanager
def _replacing_file(path: StrPath) -> Iterator[Path]:
    with _temporary_for(path) as move:
        yield move.temporary
        with errors_named(path):
            _finish(move)
            os.replace(*move)


@contextlib.contextmanager
def _temporary_for(path: StrPath) -> Iterator[_Move]:
    """A context with a temporary file beside the target, which is removed at its end unless it was moved."""
    target = _regular_target(path)
    temporary = _hidden_name(target)
    try:
        with errors_named(path):
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        try:
            yield _Move(temporary, target)
        except OSError as error:
            if error.errno is None or error.filename not in (None, str(temporary)):
                raise
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _hidden_name(target: Path) -> Path:
    """A short random name beside ``target``, whose own name may already have the longest length allowed."""
    return target.with_name(f".{secrets.token_hex(8)}{target.suffix[:16]}")


def _finish(move: _Move) -> None:
    """Bring the temporary file to the disk, with the owner and permissions of an old one."""
    with open(move.temporary, "r+b") as file:
        os.fsync(file.fileno())
    if move.target.exists():
        old = move.target.stat()
        with contextlib.suppress(PermissionError):  # only root may give files away
            os.chown(move.temporary, old.st_uid, old.st_gid)
        os.chmod(move.temporary, stat.S_IMODE(old.st_mode))


def _take_places(moves: list[_Move]) -> None:
    for move in moves:
        _finish(move)
    aside = [_Move(move.target, _hidden_name(move.target)) for move in moves if move.target.exists()]
    done: list[_Move] = []
    try:
        for move in (*aside, *reversed(moves)):
            os.replace(*move)
            done.append(move)
    except BaseException:
        for move in reversed(done):
            os.replace(move.target, move.temporary)
        raise
    for move in aside:
        move.target.unlink()
