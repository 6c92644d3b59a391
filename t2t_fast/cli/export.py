"""``python -m t2t_fast export``: write a model for onnxruntime, OpenVINO or as one of torch's archives."""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from ..deploy.export import FORMATS, ExportError, check_request, export, files_of
from ..deploy.freeze import freeze
from ..deploy.openvino_ir import Int8
from ..models import T2TViT
from ..usage import UsageError, printable
from .common import add_command, check_new, count, error_console, file_name, is_out_of_memory
from .images import Failure, find_images
from .predict import DTYPES, add_model_arguments, check_for_images, load_model, read_batches, reader, report
from .streams import write_output

MIN_AGREEMENT = Int8.min_agreement
MOST_IMAGES = 600  # three hundred to calibrate, and as many held out


def add_parser(subparsers: Any) -> None:
    """Add the ``export`` command to ``subparsers``, the result of ``ArgumentParser.add_subparsers``."""
    parser = add_command(
        subparsers,
        "export",
        "write a model for other runtimes, for batches of any size. Norms are folded into the weights. The program's "
        "logits are compared with the model's before the file gets its name.",
        """
        t2t-fast export t2t_vit_14.onnx --checkpoint 81.5_T2T_ViT_14.pth.tar
        t2t-fast export t2t_vit_14.pt2 --checkpoint 81.5_T2T_ViT_14.pth.tar --img-size 384
        t2t-fast export t2t_vit_14.pt2 --pretrained --format aoti --dtype bfloat16
        t2t-fast export t2t_vit_14.xml --pretrained --int8 --calibrate imagenet/val
        """,
    )
    parser.add_argument("target", type=file_name, metavar="DST", help=".onnx, .xml (OpenVINO; with .bin) or .pt2")
    parser.add_argument("--format", choices=FORMATS, help="default: by DST; torch for .pt2")
    add_model_arguments(parser)
    parser.add_argument("--random-weights", action="store_true", help="write an untrained model, to try a runtime")
    parser.add_argument("--dtype", choices=DTYPES, help="of weights, images and logits (default: the checkpoint's)")
    parser.add_argument("--max-batch", type=count, default=1024, metavar="N", help="largest batch (%(default)s)")
    parser.add_argument("--int8", action="store_true", help="quantise OpenVINO's program; needs --calibrate")
    parser.add_argument(
        "--calibrate",
        type=file_name,
        metavar="FOLDER",
        help=f"at least {Int8.LEAST} images of the kind that the program will see: half of them for int8's ranges, "
        f"half to compare top-1 with float32 ({MOST_IMAGES} drawn at random of more)",
    )
    parser.add_argument(
        "--min-agreement",
        type=share,
        metavar="SHARE",
        help=f"of the images compared, with the same top-1 in int8; below, nothing is written ({MIN_AGREEMENT})",
    )
    parser.add_argument("--force", action="store_true", help="overwrite DST")
    parser.set_defaults(run=run, backend="auto")


def share(text: str) -> float:
    """A number from 0 to 1, as an argparse type."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted: a number from 0 to 1")
    return value


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    target, dtype = args.target, DTYPES.get(args.dtype)
    _check_int8(args)
    try:
        format = check_request(target, args.format, max_batch=args.max_batch, dtype=dtype, int8=args.int8)
    except (ExportError, ValueError) as error:
        raise UsageError(str(error)) from error
    for file in files_of(target, format):
        check_new(str(file), args.force)
    _check_weights(args)
    model = load_model(args)
    int8 = _calibration(args, model) if args.int8 else None
    try:
        frozen = freeze(model, dtype)
    except RuntimeError as error:  # the weights overflow the dtype
        if is_out_of_memory(error):
            raise
        raise UsageError(str(error)) from error
    try:
        with _progress("exporting and quantising" if args.int8 else "exporting", None):
            done = export(frozen, target, args.format, max_batch=args.max_batch, int8=int8)
    except (ExportError, ValueError) as error:
        raise UsageError(str(error)) from error
    if int8 is not None:
        found = f"top-1 as in float32 for {done['agreement']:.1%} of {done['held_out']} held-out images"
    else:
        found = "unchecked" if done["error"] is None else f"logits agree to {done['error']:.1e}"
    kind = f"{done['format']}, int8" if args.int8 else done["format"]
    line = f"wrote {target}: {kind}, {done['bytes'] / 1e6:.1f} MB, {found} ({done['checked_by']})"
    write_output(printable(line) + "\n")
    return 0


@contextlib.contextmanager
def _progress(what: str, total: int | None) -> Iterator[tuple[Progress, Any]]:
    """A context with a progress bar on a terminal's standard error; one that only moves for an unknown ``total``."""
    errors = error_console()
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        yield progress, progress.add_task(what, total=total)


def _calibration(args: argparse.Namespace, model: T2TViT) -> Int8:
    """The images of ``--calibrate``, as the model takes them; unreadable ones are reported and skipped.

    Raises:
        UsageError: Too few can be read.
    """
    check_for_images(model)
    files, failures = find_images([args.calibrate])
    for failure in failures:
        report(failure)
    random.Random(0).shuffle(files)  # folders are often sorted by class
    files = files[:MOST_IMAGES]
    images: list[Tensor] = []
    with warnings.catch_warnings(), _progress("reading images", len(files)) as (progress, task):
        warnings.filterwarnings("ignore", module="PIL")  # they do not name the file
        for batch in read_batches(files, reader(model), 16) if files else ():
            for file, image in batch:
                if isinstance(image, Tensor):
                    images.append(image)
                else:
                    report(Failure(file, str(image)))
            progress.advance(task, len(batch))
    if len(images) < Int8.LEAST:
        raise UsageError(
            f"--calibrate {args.calibrate}: {len(images)} readable images; needed: at least {Int8.LEAST}, half of them "
            "to calibrate and half to compare"
        )
    return Int8(torch.stack(images), MIN_AGREEMENT if args.min_agreement is None else args.min_agreement)


def _check_int8(args: argparse.Namespace) -> None:
    """``--int8`` and ``--calibrate`` go together, and ``--min-agreement`` with them."""
    if args.int8 and args.calibrate is None:
        raise UsageError("--int8 needs --calibrate FOLDER, with images of the kind that the program will see")
    for option, value in (("--calibrate", args.calibrate), ("--min-agreement", args.min_agreement)):
        if value is not None and not args.int8:
            raise UsageError(f"{option} is for --int8; pass both, or neither")


def _check_weights(args: argparse.Namespace) -> None:
    """Random weights are written only on request."""
    trained = args.checkpoint is not None or args.pretrained
    if trained and args.random_weights:
        raise UsageError("--random-weights goes with neither --checkpoint nor --pretrained")
    if not trained and not args.random_weights:
        raise UsageError(
            "no --checkpoint and no --pretrained: pass one of them, or --random-weights to write random weights"
        )
