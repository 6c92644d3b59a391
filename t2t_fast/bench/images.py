"""Batches of normalised images: photographs that scikit-learn ships, a folder of images or of shards, or noise."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS

from t2t_fast.bench.loader import Shards, find_shards
from t2t_fast.usage import UsageError

_MAX_PHOTOGRAPHS = 64


def load_images(folder: Path | None, synthetic: bool, batch_size: int, img_size: int, seed: int) -> tuple[Tensor, str]:
    """A float32 batch ``(batch_size, 3, img_size, img_size)``, and a description of its origin.

    Every image is a crop of a photograph at a random position, scale and aspect ratio.

    Raises:
        UsageError: There are no photographs.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if synthetic:
            return torch.randn(batch_size, 3, img_size, img_size), "random noise"
        photographs, origin = _sample_photographs() if folder is None else _read_folder(folder, seed)
        crop = transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    img_size, scale=(0.1, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
                ),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
            ]
        )
        return torch.stack([crop(photographs[i % len(photographs)]) for i in range(batch_size)]), origin


def _sample_photographs() -> tuple[list[Image.Image], str]:
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise UsageError(
            "the default photographs come with scikit-learn, which is not installed: "
            "pip install scikit-learn, or pass --images FOLDER or --synthetic"
        ) from error
    sample = load_sample_images()
    names = " and ".join(Path(name).name for name in sample.filenames)
    return [Image.fromarray(image) for image in sample.images], f"crops of {names} (scikit-learn)"


def _read_folder(folder: Path, seed: int) -> tuple[list[Image.Image], str]:
    shards = find_shards(folder)
    photographs, unreadable = [], 0
    images = itertools.islice(Shards(shards), _MAX_PHOTOGRAPHS) if shards else _open_files(folder, seed)
    for image in images:
        if image is None:
            unreadable += 1
            continue
        image.thumbnail((1024, 1024))  # large photographs would fill the memory
        photographs.append(image)
        if len(photographs) == _MAX_PHOTOGRAPHS:
            break
    if not photographs:
        detail = f"{unreadable} files, none of them readable" if unreadable or shards else "none"
        kinds = f"{', '.join(IMG_EXTENSIONS)}, or .tar with such files"
        raise UsageError(f"--images: {str(folder)!r} holds {detail}; accepted: {kinds}")
    skipped = f", {unreadable} unreadable files skipped" if unreadable else ""
    return photographs, f"crops of {len(photographs)} images in {folder}{skipped}"


def _open_files(folder: Path, seed: int) -> Iterator[Image.Image | None]:
    """The images in a folder and its subfolders, shuffled; None for one that cannot be read."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    random.Random(seed).shuffle(files)
    for path in files:
        try:
            with Image.open(path) as image:
                yield image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            yield None
