"""Export models to other runtimes: ONNX, and torch's archives, plain or compiled ahead of time."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import use_backend
from ..files import check_target, replacing
from ..numerics import no_autocast
from .freeze import FrozenT2TViT, freeze, relative_error

FORMATS = ("onnx", "torch", "aoti")
_SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "aoti": ".pt2"}
# Relative norm of the logits' difference, by dtype.
_ACCEPTED = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_ONNX_DTYPES = (torch.float32, torch.float16)
_OPSET = 18
_MAX_BATCH = 2**31 - 1


class ExportError(RuntimeError):
    """A model cannot be exported, or its export computes something else; the message says why."""


def export(
    model: nn.Module, path: str | os.PathLike[str], format: str | None = None, *, max_batch: int = 1024
) -> dict[str, Any]:
    """Freeze ``model`` and write it as a program that runs without this package, for batches of any size.

    The program consists of convolutions, matmuls and softmax, without operators of this package. Its images have the
    model's ``img_size`` and dtype; for another dtype freeze the model to it first. Before the file gets its name, it is
    loaded again and its logits for batches of one and three images are compared with the model's.

    Args:
        model: A :class:`T2TViT`, a frozen one, or any model that :func:`t2t_fast.optimize` takes.
        path: The file. An existing one is replaced after the check; symbolic links are followed; a device or FIFO is
            written to directly.
        format: ``"onnx"`` (opset 18; needs the packages onnx and onnxscript, and onnxruntime to be checked),
            ``"torch"`` (``torch.export.load``) or ``"aoti"`` (compiled for the model's device by AOTInductor, for
            ``torch._inductor.aoti_load_package``; needs a C++ compiler). None decides by the suffix: ``.onnx``, or
            ``.pt2`` for ``"torch"``.
        max_batch: The largest batch that the program accepts.

    Returns:
        ``format``, ``bytes``, ``error`` (relative norm of the logits' difference; None without a runtime to check it)
        and ``checked_by``.

    Raises:
        TypeError: ``model`` is not a T2T-ViT.
        ValueError: Unknown ``format``, or a suffix that does not match it.
        ExportError: A package is missing, the format lacks the model's dtype, or the program's logits differ.
        OSError: The file cannot be written (``filename`` is ``path``); an old one is untouched.
    """
    format = check_request(path, format, max_batch=max_batch)
    frozen = model if isinstance(model, FrozenT2TViT) else freeze(model)
    _check_dtype(format, frozen.dtype)
    images = _images(frozen, 4)
    with replacing(path) as temporary:
        with _quiet(), no_autocast(images):
            batch = torch.export.Dim("batch", min=1, max=max_batch)
            program = torch.export.export(frozen, (images,), dynamic_shapes=({0: batch},))
            error, checked_by = _WRITERS[format](frozen, program, images, temporary)
        if error is not None and not error <= _ACCEPTED[frozen.dtype]:
            raise ExportError(f"the exported program's logits differ by {error:.1e} of their norm: please report it")
        size = temporary.stat().st_size
    return {"format": format, "bytes": size, "error": error, "checked_by": checked_by}


def check_request(
    path: str | os.PathLike[str], format: str | None, *, max_batch: int, dtype: torch.dtype | None = None
) -> str:
    """Make all checks of :func:`export` that need no model, and return the format.

    Raises:
        ValueError, ExportError, OSError: As :func:`export`.
    """
    format = _format_for(Path(path), format)
    if not 4 <= max_batch <= _MAX_BATCH:
        raise ValueError(f"max_batch must be at least 4 and at most {_MAX_BATCH}, got {max_batch}")
    if format == "onnx" and (missing := [name for name in ("onnx", "onnxscript") if not _has(name)]):
        raise ExportError(f"writing ONNX needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    if dtype is not None:
        _check_dtype(format, dtype)
    check_target(path)
    return format


def _check_dtype(format: str, dtype: torch.dtype) -> None:
    if format == "onnx" and dtype not in _ONNX_DTYPES:
        raise ExportError(f"ONNX is written in float32 or float16, the model is in {dtype}: freeze it to one")


def _format_for(path: Path, format: str | None) -> str:
    if format is None:
        format = {".onnx": "onnx", ".pt2": "torch"}.get(path.suffix, "")
        if not format:
            raise ValueError(f"path={str(path)!r} must end in .onnx or .pt2, or pass format=")
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown; accepted: {', '.join(FORMATS)}")
    if path.suffix != _SUFFIXES[format]:
        raise ValueError(f"path={str(path)!r} must end in {_SUFFIXES[format]} for format={format!r}")
    return format


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _images(frozen: FrozenT2TViT, batch: int) -> Tensor:
    shape = (batch, frozen.model.tokens_to_token.in_chans, *frozen.model.img_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
    return noise.to(frozen.model.cls_token.device, frozen.dtype)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporters' messages; errors are raised all the same."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _write_onnx(frozen: FrozenT2TViT, program: Any, images: Tensor, path: Path) -> tuple[float | None, str]:
    """Write with onnxscript's optimizer, or without it if that changes the logits: it drops an addend of 1e-8."""
    error: float | None = None
    for optimize in (True, False):
        made = torch.onnx.export(
            program, (images,), dynamo=True, opset_version=_OPSET, optimize=optimize, verbose=False,
            input_names=["images"], output_names=["logits"],
        )  # fmt: skip
        assert made is not None
        _name_batch(made.model.graph)
        made.save(str(path), external_data=False)
        error = _compare(frozen, path, "onnx") if _has("onnxruntime") else None
        if error is None or error <= _ACCEPTED[frozen.dtype]:
            break
    return error, "nothing: onnxruntime is not installed" if error is None else "onnxruntime"


def _name_batch(graph: Any) -> None:
    """Name the batch dimension, for which the exporter may invent a symbol."""
    for value in (*graph.inputs, *graph.outputs):
        value.shape[0] = "batch"


def _write_torch(frozen: FrozenT2TViT, program: Any, images: Tensor, path: Path) -> tuple[float | None, str]:
    buffer = io.BytesIO()  # writing to a path, torch would hide the system's errors
    torch.export.save(program, buffer)
    path.write_bytes(buffer.getvalue())
    return _compare(frozen, path, "torch"), "torch.export"


def _write_aoti(frozen: FrozenT2TViT, program: Any, images: Tensor, path: Path) -> tuple[float | None, str]:
    buffer = io.BytesIO()
    torch._inductor.aoti_compile_and_package(program, package_path=buffer)
    path.write_bytes(buffer.getvalue())
    return _compare(frozen, path, "aoti"), "AOTInductor"


_WRITERS: dict[str, Callable[[FrozenT2TViT, Any, Tensor, Path], tuple[float | None, str]]] = {
    "onnx": _write_onnx,
    "torch": _write_torch,
    "aoti": _write_aoti,
}


@torch.no_grad()
def _compare(frozen: FrozenT2TViT, path: Path, format: str) -> float:
    """The larger error of two batch sizes that the program was not traced with; NaN counts as the largest."""
    run, errors = load(path, format), []
    for batch in (1, 3):
        images = _images(frozen, batch)
        with use_backend("aten"):  # the program's operations; other backends round differently in 16 bits
            errors.append(relative_error(run(images), frozen(images)))
    return max(errors, key=lambda error: (error != error, error))


def load(path: str | os.PathLike[str], format: str) -> Callable[[Tensor], Tensor]:
    """The program in ``path``, as a function from images to logits; onnxruntime runs on the CPU."""
    if format == "torch":
        return torch.export.load(path).module()
    if format == "aoti":
        return torch._inductor.aoti_load_package(str(path))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.cpu().numpy()})[0])
