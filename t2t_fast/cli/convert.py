"""``python -m t2t_fast convert``: translate a checkpoint to another layout or file format."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..models.checkpoints import (
    Checkpoint,
    CheckpointError,
    check_checkpoint_target,
    infer_architecture,
    lookalikes,
    read_checkpoint,
    save_checkpoint,
)
from ..models.layouts import LAYOUTS
from ..usage import UsageError, printable
from .common import add_command, check_new, file_name
from .streams import write_output


def add_parser(subparsers: Any) -> None:
    """Add the ``convert`` command to ``subparsers``, the result of ``ArgumentParser.add_subparsers``."""
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
    parser.add_argument("source", type=file_name, metavar="SRC", help="a file of any layout; the suffixes of DST")
    parser.add_argument("target", type=file_name, metavar="DST", help=".pth, .pth.tar, .pt, .safetensors or .npz")
    parser.add_argument("--to", choices=LAYOUTS, default="official", help="layout of DST (default: %(default)s)")
    parser.add_argument("--no-ema", action="store_true", help="take the trained weights even if SRC has averaged ones")
    parser.add_argument("--force", action="store_true", help="overwrite DST")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    source, target = args.source, args.target
    check_checkpoint_target(target)
    check_new(target, args.force)
    checkpoint = read_checkpoint(source, use_ema=not args.no_ema)
    tensors = f"{len(checkpoint.state_dict)} tensors from {checkpoint.source}, {checkpoint.layout} layout"
    lines = [f"read   {source}: {tensors}", *(f"       {note}" for note in checkpoint.notes)]
    lines.append(f"model  {_describe_model(checkpoint)}")
    try:
        save_checkpoint(checkpoint.state_dict, target, args.to, checkpoint.grid_size)
        size = f", {Path(target).stat().st_size / 1e6:.1f} MB" if Path(target).is_file() else ""
        lines.append(f"wrote  {target}: {args.to} layout{size}")
    except CheckpointError as error:  # about the weights: the target has been checked already
        raise UsageError(f"{source}: {error}") from error
    finally:
        write_output("".join(f"{printable(line)}\n" for line in lines))
    return 0


def _describe_model(checkpoint: Checkpoint) -> str:
    try:
        name, kwargs = infer_architecture(checkpoint.state_dict, checkpoint.grid_size)
    except CheckpointError as error:  # a custom width or depth converts as well
        return str(error)
    alike = f" (or {' or '.join(lookalikes(name))}: same shapes)" if lookalikes(name) else ""
    return f"{name}{alike}, " + ", ".join(f"{key}={value}" for key, value in kwargs.items())
