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
from typing import Any

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


@contextlib.contextmanager
def _replacing_file(path: StrPath) -> Iterator[Path]:
    target = _regular_target(path)
    # A short random name: the target's name may already have the longest length allowed.
    temporary = target.with_name(f".{secrets.token_hex(8)}{target.suffix[:16]}")
    try:
        with errors_named(path):
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        try:
            yield temporary
        except OSError as error:
            if error.errno is None or error.filename not in (None, str(temporary)):
                raise
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        with errors_named(path):
            _take_place(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _take_place(temporary: Path, target: Path) -> None:
    with open(temporary, "r+b") as file:
        os.fsync(file.fileno())
    if target.exists():
        old = target.stat()
        with contextlib.suppress(PermissionError):  # only root may give files away
            os.chown(temporary, old.st_uid, old.st_gid)
        os.chmod(temporary, stat.S_IMODE(old.st_mode))
    os.replace(temporary, target)
