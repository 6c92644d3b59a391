"""``python -m t2t_fast convert``: a checkpoint of any layout and container to another."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..models.checkpoints import (
    Checkpoint,
    CheckpointError,
    infer_architecture,
    lookalikes,
    read_checkpoint,
    save_checkpoint,
)
from ..models.layouts import LAYOUTS, LayoutError
from .common import UsageError, add_command


def add_parser(subparsers: Any) -> None:
    """Add the ``convert`` command to what ``argparse.ArgumentParser.add_subparsers`` returned."""
    parser = add_command(
        subparsers,
        "convert",
        "translate a checkpoint between layouts and file formats. The layouts are those of the official code, "
        "mmpretrain and PaddleViT. Nothing in the source is executed.",
        """
        t2t-fast convert 81.5_T2T_ViT_14.pth.tar t2t_vit_14.safetensors
        t2t-fast convert 81.7_T2T_ViTt_14.pth.tar mmpretrain.pth --to mmpretrain
        t2t-fast convert training/last.pth.tar plain.pth --no-ema --force
        """,
    )
    parser.add_argument("source", metavar="SRC", help=".pth, .pth.tar, .pt, .safetensors or .npz of any layout")
    parser.add_argument("target", metavar="DST", help=".pth, .pth.tar, .pt, .safetensors or .npz")
    parser.add_argument("--to", choices=LAYOUTS, default="official", help="layout of DST (default: %(default)s)")
    parser.add_argument("--no-ema", action="store_true", help="take the plain weights where SRC has averaged ones too")
    parser.add_argument("--force", action="store_true", help="overwrite DST")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    _convert(Path(args.source), Path(args.target), args.to, use_ema=not args.no_ema, force=args.force)
    return 0


def _convert(source: Path, target: Path, layout: str, use_ema: bool, force: bool) -> None:
    if target.exists() and not force:
        raise UsageError(f"{target}: exists; pass --force to overwrite it")
    checkpoint = read_checkpoint(source, use_ema)
    print(f"read   {source}: {len(checkpoint.state_dict)} tensors from {checkpoint.source}, {checkpoint.layout} layout")
    for note in checkpoint.notes:
        print(f"       {note}")
    print(f"model  {_describe_model(checkpoint)}")
    try:
        save_checkpoint(checkpoint.state_dict, target, layout, checkpoint.grid_size)
    except LayoutError as error:
        raise UsageError(f"{source}: {error}") from error
    except OSError as error:  # its own file name would be that of a temporary file
        raise UsageError(f"{target}: {error.strerror or error}") from error
    print(f"wrote  {target}: {layout} layout, {target.stat().st_size / 1e6:.1f} MB")


def _describe_model(checkpoint: Checkpoint) -> str:
    try:
        name, kwargs = infer_architecture(checkpoint.state_dict, checkpoint.grid_size)
    except CheckpointError as error:  # a custom width or depth converts as well
        return str(error)
    alike = f" (or {' or '.join(lookalikes(name))}: same shapes)" if lookalikes(name) else ""
    return f"{name}{alike}, " + ", ".join(f"{key}={value}" for key, value in kwargs.items())
