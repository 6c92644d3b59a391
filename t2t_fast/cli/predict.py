"""``python -m t2t_fast predict``: classify image files."""

from __future__ import annotations

import argparse
import math
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
from ..files import check_target, open_descriptor, require_regular
from ..macs import own_in_chans
from ..models import T2TViT, create_model
from ..models.variants import VARIANTS
from ..usage import UsageError, printable
from .common import (
    add_command,
    count,
    error_console,
    file_name,
    image_size,
    means_standard_output,
    output_json,
    pixels,
    write_table,
)
from .images import Failure, ImageError, find_images, read_image
from .streams import say

DEFAULT_MODEL = "t2t_vit_14"
# Every model needs ops without a native implementation.
MODEL_BACKENDS = tuple(backend for backend in BACKENDS if backend != "native")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_parser(subparsers: Any) -> None:
    """Add the ``predict`` command to ``subparsers``, the result of ``ArgumentParser.add_subparsers``."""
    parser = add_command(
        subparsers,
        "predict",
        "classify images. Files that cannot be read are reported and skipped: the exit code is then 1, or 2 if no file "
        "could be read. Transparent pixels count as white.",
        """
        t2t-fast predict cat.jpg --pretrained
        t2t-fast predict photos/ 'more/**/*.png' --checkpoint 81.5_T2T_ViT_14.pth.tar
        t2t-fast predict photos/ --checkpoint cifar10.pth --class-names names.txt --json predictions.json
        t2t-fast predict photos/ --pretrained --device cuda --dtype bfloat16 --batch-size 64
        """,
    )
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="files, folders (searched recursively) and globs")
    add_model_arguments(parser)
    parser.add_argument("--batch-size", type=count, default=16, metavar="N", help="images at a time (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ... (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--backend", choices=MODEL_BACKENDS, default="auto", help="default: %(default)s")
    parser.add_argument("--top-k", type=count, default=5, metavar="K", help="classes per image (%(default)s)")
    parser.add_argument("--json", type=file_name, metavar="FILE", help="also write JSON; for -, write only JSON")
    parser.add_argument(
        "--class-names", type=file_name, metavar="FILE", help="one name per line, in the order of the classes"
    )
    parser.set_defaults(run=run)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that :func:`load_model` reads."""
    add = parser.add_argument
    add("--model", metavar="NAME", help=f"default: recognised from the checkpoint, else {DEFAULT_MODEL}")
    add("--checkpoint", type=file_name, metavar="FILE", help="weights in any format that t2t-fast convert reads")
    add("--pretrained", action="store_true", help="download the released weights")
    add("--img-size", nargs="+", type=pixels, metavar=("H", "W"), help="pixels (default: the model's)")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code: 1 if some images cannot be read, 2 if all cannot."""
    only_json = args.json is not None and means_standard_output(args.json)
    if args.json is not None and not only_json:
        check_target(args.json)
    files, failures = find_images(args.images)
    for failure in failures:
        report(failure)
    device, model, results = None, None, list[dict[str, Any]]()
    if files:
        device = _find_device(args.device)
        model = _prepare(load_model(args), device, DTYPES[args.dtype])
        if args.checkpoint is None and not args.pretrained:
            say("warning: no --checkpoint and no --pretrained: the weights are random and the labels mean nothing")
        names = _class_names(args.class_names, model.num_classes)
        for good, bad in _classify(args, model, device, files):
            results += [{"file": file, "top": [{**p, "label": names[p["index"]]} for p in top]} for file, top in good]
            for failure in bad:
                report(failure)
            failures += bad
    try:
        if args.json is not None:
            output_json(_record(args, model, device, results, failures), args.json)
    finally:
        if results and not only_json:
            write_table(_table(results))
    return 2 if not results else 1 if failures else 0


def report(failure: Failure) -> None:
    """Say on standard error which file was skipped, and why."""
    say(f"{printable(failure.file) or repr('')}: {failure.reason}")


def _prepare(model: T2TViT, device: torch.device, dtype: torch.dtype) -> T2TViT:
    check_for_images(model)
    return model.to(device, dtype).eval()


def check_for_images(model: T2TViT) -> None:
    """Check that image files can be classified.

    Raises:
        UsageError: The model has no head, or takes neither colours nor grey.
    """
    if model.num_classes == 0:
        raise UsageError("the model has no head, so there are no classes to predict")
    if own_in_chans(model) not in (1, 3):
        raise UsageError(f"the model takes {own_in_chans(model)} channels; images have 3, or 1 in grey")


def _classify(
    args: argparse.Namespace, model: T2TViT, device: torch.device, files: list[str]
) -> Iterator[tuple[list[tuple[str, list[dict[str, Any]]]], list[Failure]]]:
    """Per batch: the files with their most probable classes, and the failures."""
    errors, dtype = error_console(), DTYPES[args.dtype]
    with (
        warnings.catch_warnings(),
        Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress,
    ):
        warnings.filterwarnings("ignore", module="PIL")  # they do not name the file
        task = progress.add_task("predicting", total=len(files))
        for batch in read_batches(files, reader(model), args.batch_size):
            read = [(file, image) for file, image in batch if isinstance(image, Tensor)]
            bad = [Failure(file, str(error)) for file, error in batch if not isinstance(error, Tensor)]
            tops = []
            if read:
                images = torch.stack([image for _, image in read])
                tops = _predict(model, images.to(device, dtype), args.top_k)
            classified = list(zip((file for file, _ in read), tops, strict=True))
            reason = f"the model's output is not finite in {args.dtype}"
            bad += [Failure(file, reason) for file, top in classified if top is None]
            yield [(file, top) for file, top in classified if top is not None], bad
            progress.advance(task, len(batch))


def _find_device(name: str) -> torch.device:
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except Exception as error:  # for a device that this build lacks torch raises anything
        reason = str(error).partition(". ")[0]
        raise UsageError(f"--device {name} cannot be used here: {reason}") from error
    return device


def load_model(args: argparse.Namespace) -> T2TViT:
    """The model that the arguments name."""
    size = image_size(args.img_size)
    kwargs: dict[str, Any] = {} if size is None else {"img_size": size}
    name = DEFAULT_MODEL if args.model is None and args.checkpoint is None else args.model
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
    return model


def _architecture(model: Any) -> str:
    return str(model.pretrained_cfg["architecture"])


def _class_names(path: str | None, num_classes: int) -> list[str]:
    if path is None:
        if num_classes == 1000:
            return list(ImageNetInfo().label_descriptions())
        return [str(index) for index in range(num_classes)]
    if open_descriptor(path) is None:  # an open descriptor may be a pipe, as for `--class-names <(...)`
        require_regular(path)
    try:
        with open(path, encoding="utf-8-sig") as file:
            names = file.read().splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"--class-names {path}: not UTF-8 text") from error
    while names and not names[-1].strip():
        names.pop()
    if len(names) != num_classes:
        raise UsageError(f"--class-names {path}: {len(names)} names, but the model has {num_classes} classes")
    return [name.strip() for name in names]


def _transform(model: T2TViT) -> Any:
    """timm's evaluation transform of the released weights with the model's image size; without any, the model's own."""
    architecture, in_chans = _architecture(model), own_in_chans(model)
    tags = (tag for tag, (_, size) in VARIANTS[architecture].weights.items() if (size, size) == model.img_size)
    tag = next(tags, None)
    released = get_pretrained_cfg(f"{architecture}.{tag}") if tag else None
    pretrained_cfg = released.to_dict() if released else model.pretrained_cfg
    config = resolve_data_config({"input_size": (in_chans, *model.img_size)}, pretrained_cfg=pretrained_cfg)
    if in_chans == 1:
        config.update({key: (math.fsum(config[key]) / 3,) for key in ("mean", "std")})
    return create_transform(**config)


def reader(model: T2TViT) -> Callable[[str], Tensor | ImageError]:
    """A function that reads one file as the model's input."""
    transform, grey = _transform(model), own_in_chans(model) == 1

    def read(file: str) -> Tensor | ImageError:
        try:
            return transform(read_image(file, grey))
        except ImageError as error:
            return error

    return read


def read_batches(
    files: list[str], read: Callable[[str], Tensor | ImageError], batch_size: int
) -> Iterator[list[tuple[str, Tensor | ImageError]]]:
    """Batches of (file, image) pairs; the next batch is read while the caller works on this one."""
    batches = [files[start : start + batch_size] for start in range(0, len(files), batch_size)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        ahead = pool.map(read, batches[0])
        for batch, following in zip(batches, [*batches[1:], []], strict=True):
            images = list(ahead)
            ahead = pool.map(read, following)
            yield list(zip(batch, images, strict=True))


@torch.inference_mode()
def _predict(model: T2TViT, images: Tensor, top_k: int) -> list[list[dict[str, Any]] | None]:
    """Per image the ``top_k`` most probable classes, best first; None if the output is not finite."""
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
    model: T2TViT | None,
    device: torch.device | None,
    results: list[dict[str, Any]],
    failures: list[Failure],
) -> dict[str, Any]:
    return {
        "t2t_fast": __version__,
        "model": _architecture(model) if model else args.model,
        "weights": args.checkpoint or ("pretrained" if args.pretrained else None),
        "image_size": list(model.img_size) if model else None,
        "device": str(device) if device else None,
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
