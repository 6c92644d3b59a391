"""``python -m t2t_fast predict``: the likeliest classes of image files."""

from __future__ import annotations

import argparse
import math
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from timm.models import get_pretrained_cfg
from torch import Tensor

from .. import __version__
from ..config import BACKENDS
from ..macs import own_in_chans
from ..models import T2TViT, create_model
from ..models.checkpoints import lookalikes
from ..models.variants import VARIANTS
from .common import (
    PROG,
    UsageError,
    add_command,
    check_json_target,
    count,
    error_console,
    image_size,
    output_console,
    pixels,
    printable,
    write_json,
)
from .images import Failure, ImageError, find_images, read_image

DEFAULT_MODEL = "t2t_vit_14"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_parser(subparsers: Any) -> None:
    """Add the ``predict`` command to what ``argparse.ArgumentParser.add_subparsers`` returned."""
    parser = add_command(
        subparsers,
        "predict",
        "classify images. Files that cannot be read are named and the rest goes on; the exit code is then 1, and 2 "
        "if none could be read. Transparent pixels count as white.",
        """
        t2t-fast predict cat.jpg --pretrained
        t2t-fast predict photos/ 'more/**/*.png' --checkpoint 81.5_T2T_ViT_14.pth.tar
        t2t-fast predict photos/ --checkpoint cifar10.pth --class-names names.txt --json predictions.json
        t2t-fast predict photos/ --pretrained --device cuda --dtype bfloat16 --batch-size 64
        """,
    )
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="files, folders (searched recursively) and globs")
    parser.add_argument("--model", metavar="NAME", help=f"default: read off the checkpoint, else {DEFAULT_MODEL}")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights, of any layout that t2t-fast convert reads")
    parser.add_argument("--pretrained", action="store_true", help="download the released weights")
    parser.add_argument("--img-size", nargs="+", type=pixels, metavar=("H", "W"), help="pixels (default: the model's)")
    parser.add_argument("--batch-size", type=count, default=16, metavar="N", help="images at a time (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ... (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="%(default)s unless told")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="%(default)s unless told")
    parser.add_argument("--top-k", type=count, default=5, metavar="K", help="classes per image (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write JSON too, or only it with - for standard output")
    parser.add_argument("--class-names", metavar="FILE", help="one name per line, in the order of the classes")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code: 1 if some images cannot be read, 2 if none can."""
    if args.json:
        check_json_target(args.json)
    errors = error_console()
    files, failures = find_images(args.images)
    for failure in failures:
        _report(errors, failure)
    if not files:
        return 2
    device = _find_device(args.device)
    model = load_model(args, errors)
    if model.num_classes == 0:
        raise UsageError(f"{args.checkpoint}: the model has no head, so there are no classes to predict")
    if own_in_chans(model) not in (1, 3):
        raise UsageError(f"the model takes {own_in_chans(model)} channels; images have 3, or 1 in grey")
    model = model.to(device, DTYPES[args.dtype]).eval()
    names = _class_names(args.class_names, model.num_classes)

    results: list[dict[str, Any]] = []
    with (
        warnings.catch_warnings(),
        Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress,
    ):
        warnings.filterwarnings("ignore", module="PIL")  # they name no file; what matters is reported with its name
        task = progress.add_task("predicting", total=len(files))
        for batch in _read_batches(files, _reader(model), args.batch_size):
            good = [(file, image) for file, image in batch if isinstance(image, Tensor)]
            bad = [Failure(file, str(error)) for file, error in batch if not isinstance(error, Tensor)]
            if good:
                images = torch.stack([image for _, image in good])
                predictions = _predict(model, images.to(device, DTYPES[args.dtype]), args.top_k)
                for (file, _), top in zip(good, predictions, strict=True):
                    if top is None:
                        bad.append(Failure(file, f"the model's output is not finite in {args.dtype}"))
                    else:
                        results.append({"file": file, "top": [{**p, "label": names[p["index"]]} for p in top]})
            for failure in bad:
                _report(progress.console, failure)
            failures += bad
            progress.advance(task, len(batch))

    if not results:
        return 2
    if args.json:
        write_json(_record(args, model, device, results, failures), args.json)
    if args.json != "-":
        output_console().print(_table(results))
    return 1 if failures else 0


def _report(console: Any, failure: Failure) -> None:
    console.print(f"{PROG}: {printable(failure.file)}: {failure.reason}")


def _find_device(name: str) -> torch.device:
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise UsageError(f"--device {name} cannot be used here: {reason}") from error
    return device


def load_model(args: argparse.Namespace, errors: Any) -> T2TViT:
    """The model that the arguments name; what the user should know of it goes to ``errors``."""
    size = image_size(args.img_size)
    kwargs: dict[str, Any] = {} if size is None else {"img_size": size}
    name = args.model or (None if args.checkpoint else DEFAULT_MODEL)
    try:
        model = create_model(
            name, checkpoint=args.checkpoint, pretrained=args.pretrained, backend=args.backend, **kwargs
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    except RuntimeError as error:
        if not args.pretrained:
            raise
        raise UsageError(str(error)) from error
    assert isinstance(model, T2TViT)
    if not args.checkpoint and not args.pretrained:
        errors.print(
            f"{PROG}: warning: no --checkpoint and no --pretrained: the weights are random and the labels mean nothing"
        )
    if name is None and (others := lookalikes(_architecture(model))):
        errors.print(
            f"{PROG}: note: taken for {_architecture(model)}; {' and '.join(others)} cannot be told from it by the "
            "weights, --model decides"
        )
    return model


def _architecture(model: Any) -> str:
    return str(model.pretrained_cfg["architecture"])


def _class_names(path: str | None, num_classes: int) -> list[str]:
    if path is None:
        if num_classes == 1000:
            return list(ImageNetInfo().label_descriptions())
        return [str(index) for index in range(num_classes)]
    try:
        names = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"--class-names {path}: not UTF-8 text") from error
    while names and not names[-1].strip():
        names.pop()
    if len(names) != num_classes:
        raise UsageError(f"--class-names {path}: {len(names)} names, but the model has {num_classes} classes")
    return [name.strip() for name in names]


def _transform(model: T2TViT) -> Any:
    """timm's evaluation transform as the released weights for the model's image size have it, else as the model has."""
    architecture, in_chans = _architecture(model), own_in_chans(model)
    tags = (tag for tag, (_, size) in VARIANTS[architecture].weights.items() if (size, size) == model.img_size)
    tag = next(tags, None)
    released = get_pretrained_cfg(f"{architecture}.{tag}") if tag else None
    pretrained_cfg = released.to_dict() if released else model.pretrained_cfg
    config = resolve_data_config({"input_size": (in_chans, *model.img_size)}, pretrained_cfg=pretrained_cfg)
    if in_chans == 1:
        config.update({key: (math.fsum(config[key]) / 3,) for key in ("mean", "std")})
    return create_transform(**config)


def _reader(model: T2TViT) -> Callable[[str], Tensor | ImageError]:
    """Reads one file into what the model takes."""
    transform, grey = _transform(model), own_in_chans(model) == 1

    def read(file: str) -> Tensor | ImageError:
        try:
            return transform(read_image(file, grey))
        except ImageError as error:
            return error

    return read


def _read_batches(
    files: list[str], read: Callable[[str], Tensor | ImageError], batch_size: int
) -> Iterator[list[tuple[str, Tensor | ImageError]]]:
    """Pairs of file and image, a batch at a time; the next batch is read while the caller works on this one."""
    batches = [files[start : start + batch_size] for start in range(0, len(files), batch_size)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        ahead = pool.map(read, batches[0])
        for batch, following in zip(batches, [*batches[1:], []], strict=True):
            images = list(ahead)
            ahead = pool.map(read, following)
            yield list(zip(batch, images, strict=True))


@torch.inference_mode()
def _predict(model: T2TViT, images: Tensor, top_k: int) -> list[list[dict[str, Any]] | None]:
    """Per image the ``top_k`` likeliest classes, best first; None where the output is not finite."""
    probabilities = model(images).float().softmax(dim=-1).cpu()
    values, indices = probabilities.topk(min(top_k, model.num_classes))
    return [
        [{"index": i, "probability": p} for i, p in zip(row_indices, row, strict=True)]
        if math.isfinite(row[0])
        else None
        for row, row_indices in zip(values.tolist(), indices.tolist(), strict=True)
    ]


def _record(
    args: argparse.Namespace,
    model: T2TViT,
    device: torch.device,
    results: list[dict[str, Any]],
    failures: list[Failure],
) -> dict[str, Any]:
    return {
        "t2t_fast": __version__,
        "model": _architecture(model),
        "weights": args.checkpoint or ("pretrained" if args.pretrained else None),
        "image_size": list(model.img_size),
        "device": str(device),
        "dtype": args.dtype,
        "backend": args.backend,
        "images": results,
        "failed": [{"file": failure.file, "reason": failure.reason} for failure in failures],
    }


def _table(results: list[dict[str, Any]]) -> Table:
    table = Table()
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("index", justify="right")
    table.add_column("%", justify="right")
    for result in results:
        for rank, prediction in enumerate(result["top"]):
            table.add_row(
                Text(printable(result["file"]) if rank == 0 else ""),
                Text(printable(prediction["label"])),
                str(prediction["index"]),
                f"{100 * prediction['probability']:.2f}",
            )
        table.add_section()
    return table
