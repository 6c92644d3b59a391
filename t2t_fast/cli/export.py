"""``python -m t2t_fast export``: a model as ONNX or as an archive of torch's."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ..models.export import FORMATS, ExportError, export
from ..models.freeze import freeze
from .common import UsageError, add_command, count, error_console, pixels
from .predict import DEFAULT_MODEL, load_model

DTYPES = ("float32", "float16", "bfloat16")


def add_parser(subparsers: Any) -> None:
    """Add the ``export`` command to what ``argparse.ArgumentParser.add_subparsers`` returned."""
    parser = add_command(
        subparsers,
        "export",
        "write a model for other runtimes, for batches of any size. Norms are folded into the weights, and the logits "
        "of the written file are compared with the model's before it takes its name.",
        """
        t2t-fast export t2t_vit_14.onnx --checkpoint 81.5_T2T_ViT_14.pth.tar
        t2t-fast export t2t_vit_14.pt2 --checkpoint 81.5_T2T_ViT_14.pth.tar --img-size 384
        t2t-fast export t2t_vit_14.pt2 --pretrained --format aoti --dtype bfloat16
        """,
    )
    parser.add_argument("target", metavar="DST", help=".onnx or .pt2")
    parser.add_argument("--format", choices=FORMATS, help="default: onnx for .onnx, torch for .pt2")
    parser.add_argument("--model", metavar="NAME", help=f"default: read off the checkpoint, else {DEFAULT_MODEL}")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights, of any layout that t2t-fast convert reads")
    parser.add_argument("--pretrained", action="store_true", help="download the released weights")
    parser.add_argument("--img-size", nargs="+", type=pixels, metavar=("H", "W"), help="pixels (default: the model's)")
    parser.add_argument("--dtype", choices=DTYPES, help="of weights, images and logits (default: the checkpoint's)")
    parser.add_argument("--max-batch", type=count, default=1024, metavar="N", help="largest batch (%(default)s)")
    parser.add_argument("--force", action="store_true", help="overwrite DST")
    parser.set_defaults(run=run, backend="auto")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    target = Path(args.target)
    if target.exists() and not args.force:
        raise UsageError(f"{target}: exists; pass --force to overwrite it")
    if not target.absolute().parent.is_dir():
        raise UsageError(f"{target}: no such folder")
    model = load_model(args, error_console())
    try:
        frozen = freeze(model, None if args.dtype is None else getattr(torch, args.dtype))
    except RuntimeError as error:  # a range too small for the weights
        raise UsageError(str(error)) from error
    try:
        done = export(frozen, target, args.format, max_batch=args.max_batch)
    except (ExportError, ValueError) as error:
        raise UsageError(str(error)) from error
    found = "unchecked" if done["error"] is None else f"logits agree to {done['error']:.1e}"
    print(f"wrote {target}: {done['format']}, {done['bytes'] / 1e6:.1f} MB, {found} ({done['checked_by']})")
    return 0
