"""``python -m t2t_fast export``: write a model as ONNX or as one of torch's archives."""

from __future__ import annotations

import argparse
from typing import Any

from ..deploy.export import FORMATS, ExportError, check_request, export
from ..deploy.freeze import freeze
from ..usage import UsageError, printable
from .common import add_command, check_new, count, file_name, is_out_of_memory
from .predict import DTYPES, add_model_arguments, load_model
from .streams import write_output


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
        """,
    )
    parser.add_argument("target", type=file_name, metavar="DST", help=".onnx or .pt2")
    parser.add_argument("--format", choices=FORMATS, help="default: onnx for .onnx, torch for .pt2")
    add_model_arguments(parser)
    parser.add_argument("--random-weights", action="store_true", help="write an untrained model, to try a runtime")
    parser.add_argument("--dtype", choices=DTYPES, help="of weights, images and logits (default: the checkpoint's)")
    parser.add_argument("--max-batch", type=count, default=1024, metavar="N", help="largest batch (%(default)s)")
    parser.add_argument("--force", action="store_true", help="overwrite DST")
    parser.set_defaults(run=run, backend="auto")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    target, dtype = args.target, DTYPES.get(args.dtype)
    try:
        check_request(target, args.format, max_batch=args.max_batch, dtype=dtype)
    except (ExportError, ValueError) as error:
        raise UsageError(str(error)) from error
    check_new(target, args.force)
    _check_weights(args)
    model = load_model(args)
    try:
        frozen = freeze(model, dtype)
    except RuntimeError as error:  # the weights overflow the dtype
        if is_out_of_memory(error):
            raise
        raise UsageError(str(error)) from error
    try:
        done = export(frozen, target, args.format, max_batch=args.max_batch)
    except (ExportError, ValueError) as error:
        raise UsageError(str(error)) from error
    found = "unchecked" if done["error"] is None else f"logits agree to {done['error']:.1e}"
    line = f"wrote {target}: {done['format']}, {done['bytes'] / 1e6:.1f} MB, {found} ({done['checked_by']})"
    write_output(printable(line) + "\n")
    return 0


def _check_weights(args: argparse.Namespace) -> None:
    """Random weights are written only on request."""
    trained = args.checkpoint is not None or args.pretrained
    if trained and args.random_weights:
        raise UsageError("--random-weights goes with neither --checkpoint nor --pretrained")
    if not trained and not args.random_weights:
        raise UsageError(
            "no --checkpoint and no --pretrained: pass one of them, or --random-weights to write random weights"
        )
