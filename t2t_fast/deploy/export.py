"""Export models to other runtimes: ONNX, OpenVINO, and torch's archives, plain or compiled ahead of time."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..dispatch import use_backend
from ..files import check_target, check_together, replacing, replacing_together
from ..numerics import no_autocast
from . import openvino_ir
from .freeze import FrozenT2TViT, freeze, relative_error
from .openvino_ir import Int8

FORMATS = ("onnx", "openvino", "torch", "aoti")
_SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2", "aoti": ".pt2"}
_BY_SUFFIX = {".onnx": "onnx", ".xml": "openvino", ".pt2": "torch"}
_NEEDED = {"onnx": ("onnx", "onnxscript"), "openvino": ("openvino", "onnx", "onnxscript")}
# Relative norm of the logits' difference, by dtype.
_ACCEPTED = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_DTYPES = {"onnx": (torch.float32, torch.float16), "openvino": (torch.float32, torch.float16)}
_NAMES = {"onnx": "ONNX", "openvino": "OpenVINO's format"}
_OPSET = 18
_MAX_BATCH = 2**31 - 1


class ExportError(RuntimeError):
    """A model cannot be exported, or its export computes something else; the message says why."""


class Checked(NamedTuple):
    """How a written program was compared with the model.

    Attributes:
        error: Relative norm of the logits' difference; None without a runtime.
        by: The runtime.
        agreement: Of an int8 program, the share of held-out images with the same top-1.
        held_out: The number of those images.
    """

    error: float | None
    by: str
    agreement: float | None = None
    held_out: int | None = None


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    max_batch: int = 1024,
    int8: Int8 | None = None,
) -> dict[str, Any]:
    """Freeze ``model`` and write it as a program that runs without this package, for batches of any size.

    The program consists of convolutions, matmuls and softmax, without operators of this package. Its images have the
    model's ``img_size`` and dtype; for another dtype freeze the model to it first. Before the file gets its name, it is
    loaded again and its logits for batches of one and three images are compared with the model's.

    Args:
        model: A :class:`T2TViT`, a frozen one, or any model that :func:`t2t_fast.optimize` takes.
        path: The file. An existing one is replaced after the check; symbolic links are followed; a device or FIFO is
            written to directly. OpenVINO's weights go to the file of the same name in ``.bin``: both are replaced, or
            none.
        format: ``"onnx"`` (opset 18; needs the packages onnx and onnxscript, and onnxruntime to be checked),
            ``"openvino"`` (IR, for ``openvino.Core().read_model``; needs openvino, onnx and onnxscript), ``"torch"``
            (``torch.export.load``) or ``"aoti"`` (compiled for the model's device by AOTInductor, for
            ``torch._inductor.aoti_load_package``; needs a C++ compiler). None decides by the suffix: ``.onnx``,
            ``.xml``, or ``.pt2`` for ``"torch"``.
        max_batch: The largest batch that the program must accept.
        int8: Quantise the blocks and the head to int8 (``"openvino"`` and float32 models alone; needs nncf). Then the
            logits need not agree, but the top-1 of ``int8.min_agreement`` of the images held out.

    Returns:
        ``format``, ``bytes``, ``error`` (relative norm of the logits' difference; None without a runtime to check it)
        and ``checked_by``; with ``int8`` also ``agreement`` and ``held_out``, the number of images that it is of.

    Raises:
        TypeError: ``model`` is not a T2T-ViT.
        ValueError: Unknown ``format``, or a suffix or ``int8`` that does not match it; images of ``int8`` that the
            model does not take.
        ExportError: A package is missing, the format lacks the model's dtype, the program's logits differ, or too few
            top-1 agree.
        OSError: The file cannot be written (``filename`` is ``path``); an old one is untouched.
    """
    format = check_request(path, format, max_batch=max_batch, int8=int8 is not None)
    frozen = model if isinstance(model, FrozenT2TViT) else freeze(model)
    _check_dtype(format, frozen.dtype, int8 is not None)
    images = _images(frozen, 4)
    if int8 is not None and int8.images.shape[1:] != images.shape[1:]:
        raise ValueError(f"int8.images must have shape (N, *{tuple(images.shape[1:])}), got {tuple(int8.images.shape)}")
    with _new_files(path, format) as files:
        with _quiet(), no_autocast(images):
            batch = torch.export.Dim("batch", min=1, max=max_batch)
            program = torch.export.export(frozen, (images,), dynamic_shapes=({0: batch},))
            if int8 is None:
                done = _WRITERS[format](frozen, program, images, files)
            else:
                done = _write_int8(frozen, program, images, files, int8)
        if int8 is None and done.error is not None:
            _require_equal(frozen, done.error)
        size = sum(file.stat().st_size for file in files)
    found = {} if int8 is None else {"agreement": done.agreement, "held_out": done.held_out}
    return {"format": format, "bytes": size, "error": done.error, "checked_by": done.by, **found}


def check_request(
    path: str | os.PathLike[str],
    format: str | None,
    *,
    max_batch: int,
    dtype: torch.dtype | None = None,
    int8: bool = False,
) -> str:
    """Make all checks of :func:`export` that need no model, and return the format.

    Raises:
        ValueError, ExportError, OSError: As :func:`export`.
    """
    format = _format_for(Path(path), format)
    if not 4 <= max_batch <= _MAX_BATCH:
        raise ValueError(f"max_batch must be at least 4 and at most {_MAX_BATCH}, got {max_batch}")
    if int8 and format != "openvino":
        raise ValueError(f"int8 is for format='openvino' (.xml), got format={format!r}")
    needed = (*_NEEDED.get(format, ()), *(["nncf"] if int8 else []))
    if missing := [name for name in needed if not _has(name)]:
        name = "int8 in OpenVINO's format" if int8 else _NAMES[format]
        raise ExportError(f"writing {name} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    if dtype is not None:
        _check_dtype(format, dtype, int8)
    if format == "openvino":
        check_together(*files_of(path, format))
    else:
        check_target(path)
    return format


def files_of(path: str | os.PathLike[str], format: str) -> tuple[Path, ...]:
    """The files that a program in ``path`` consists of, ``path`` first."""
    path = Path(path)
    return (path, path.with_suffix(".bin")) if format == "openvino" else (path,)


@contextlib.contextmanager
def _new_files(path: str | os.PathLike[str], format: str) -> Iterator[list[Path]]:
    """A context with temporary files for :func:`files_of`, which take their places at its end."""
    if format == "openvino":
        with replacing_together(*files_of(path, format)) as files:
            yield files
    else:
        with replacing(path) as file:
            yield [file]


def _check_dtype(format: str, dtype: torch.dtype, int8: bool = False) -> None:
    if int8 and dtype != torch.float32:
        raise ExportError(f"int8 is made of a float32 model, the model is in {dtype}: freeze it to float32")
    if dtype not in _DTYPES.get(format, (dtype,)):
        raise ExportError(
            f"{_NAMES[format]} is written in float32 or float16, the model is in {dtype}: freeze it to one"
            + (" (OpenVINO computes float32 programs in bfloat16 where told to)" if format == "openvino" else "")
        )


def _require_equal(frozen: FrozenT2TViT, error: float) -> None:
    if not error <= _ACCEPTED[frozen.dtype]:  # a NaN is not
        raise ExportError(f"the exported program's logits differ by {error:.1e} of their norm: please report it")


def _format_for(path: Path, format: str | None) -> str:
    if format is None:
        format = _BY_SUFFIX.get(path.suffix, "")
        if not format:
            raise ValueError(f"path={str(path)!r} must end in .onnx, .xml or .pt2, or pass format=")
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


def _write_onnx(frozen: FrozenT2TViT, program: Any, images: Tensor, files: list[Path]) -> Checked:
    (path,) = files
    check = (lambda: _compare(frozen, path, "onnx")) if _has("onnxruntime") else None
    error = _save_onnx(frozen, program, images, path, check)
    return Checked(error, "nothing: onnxruntime is not installed" if error is None else "onnxruntime")


def _save_onnx(
    frozen: FrozenT2TViT, program: Any, images: Tensor, path: Path, check: Callable[[], float] | None
) -> float | None:
    """Save with onnxscript's optimizer, or without it if that changes the logits: it drops an addend of 1e-8.

    ``check`` returns the error of what was saved, as does this function.
    """
    error: float | None = None
    for optimize in (True, False):
        made = torch.onnx.export(
            program, (images,), dynamo=True, opset_version=_OPSET, optimize=optimize, verbose=False,
            input_names=["images"], output_names=["logits"],
        )  # fmt: skip
        assert made is not None
        _name_batch(made.model.graph)
        made.save(str(path), external_data=False)
        error = None if check is None else check()
        if error is None or error <= _ACCEPTED[frozen.dtype]:
            break
    return error


def _write_openvino(frozen: FrozenT2TViT, program: Any, images: Tensor, files: list[Path]) -> Checked:
    with tempfile.TemporaryDirectory() as folder:
        onnx = Path(folder, "model.onnx")
        error = _save_for_openvino(frozen, program, images, onnx)
        _place(onnx.with_suffix(".xml"), files)
    return Checked(error, "OpenVINO")


def _save_for_openvino(frozen: FrozenT2TViT, program: Any, images: Tensor, onnx: Path) -> float:
    """Write the ONNX model, and OpenVINO's program made of it beside it; returns the error of the latter."""
    error = _save_onnx(frozen, program, images, onnx, lambda: _compare(frozen, openvino_ir.convert(onnx), "openvino"))
    assert error is not None
    return error


def _place(xml: Path, files: list[Path]) -> None:
    """Copy OpenVINO's two files; unlike OpenVINO, this raises the system's errors."""
    for source, target in zip(files_of(xml, "openvino"), files, strict=True):
        target.write_bytes(source.read_bytes())


def _write_int8(frozen: FrozenT2TViT, program: Any, images: Tensor, files: list[Path], int8: Int8) -> Checked:
    """Write an int8 program, made of the float32 one if that agrees with the model.

    Raises:
        ExportError: The float32 program differs, NNCF failed, or too few top-1 agree.
    """
    calibrate, held_out = int8.split()
    with tempfile.TemporaryDirectory() as folder:
        onnx = Path(folder, "model.onnx")
        _require_equal(frozen, _save_for_openvino(frozen, program, images, onnx))
        try:
            xml = openvino_ir.quantise(onnx, calibrate)
        except openvino_ir.QuantisationFailed as error:
            raise ExportError(f"NNCF could not quantise the program: {error}") from error
        run, device = openvino_ir.load(xml), frozen.model.cls_token.device
        batches = held_out.split(16)
        got = torch.cat([run(batch) for batch in batches])
        want = torch.cat([frozen(batch.to(device)).cpu() for batch in batches])
        share = openvino_ir.agreement(got, want)
        if share < int8.min_agreement:
            raise ExportError(
                f"the int8 program has the same top-1 as the float32 model on {share:.1%} of {len(want)} held-out "
                f"images, less than min_agreement={int8.min_agreement:.1%}: calibrate on more images of the kind that "
                "it will see, accept less, or stay with float32"
            )
        _place(xml, files)
    return Checked(relative_error(got, want), "OpenVINO", share, len(want))


def _name_batch(graph: Any) -> None:
    """Name the batch dimension, for which the exporter may invent a symbol."""
    for value in (*graph.inputs, *graph.outputs):
        value.shape[0] = "batch"


def _write_torch(frozen: FrozenT2TViT, program: Any, images: Tensor, files: list[Path]) -> Checked:
    (path,) = files
    buffer = io.BytesIO()  # writing to a path, torch would hide the system's errors
    torch.export.save(program, buffer)
    path.write_bytes(buffer.getvalue())
    return Checked(_compare(frozen, path, "torch"), "torch.export")


def _write_aoti(frozen: FrozenT2TViT, program: Any, images: Tensor, files: list[Path]) -> Checked:
    (path,) = files
    buffer = io.BytesIO()
    torch._inductor.aoti_compile_and_package(program, package_path=buffer)
    path.write_bytes(buffer.getvalue())
    return Checked(_compare(frozen, path, "aoti"), "AOTInductor")


_WRITERS: dict[str, Callable[[FrozenT2TViT, Any, Tensor, list[Path]], Checked]] = {
    "onnx": _write_onnx,
    "openvino": _write_openvino,
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


def load(
    path: str | os.PathLike[str],
    format: str,
    *,
    precision: str = "f32",
    threads: int | None = None,
) -> Callable[[Tensor], Tensor]:
    """The program in ``path``, as a function from images to logits; onnxruntime and OpenVINO run on the CPU.

    Args:
        path: The file.
        format: Its format.
        precision: As :func:`openvino_ir.load`.
        threads: For onnxruntime and OpenVINO; None leaves the number to them.
    """
    if format == "torch":
        return torch.export.load(path).module()
    if format == "aoti":
        return torch._inductor.aoti_load_package(str(path))
    if format == "openvino":
        return openvino_ir.load(Path(path), precision=precision, threads=threads)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = threads or 0  # 0: as many as there are cores
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.cpu().numpy()})[0])
