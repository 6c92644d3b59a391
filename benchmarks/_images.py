"""Batches of normalised images: photographs that scikit-learn ships, any folder of images, or noise."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from _common import UsageError
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset, create_loader
from torch import Tensor
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS

_MAX_PHOTOGRAPHS = 64


def load_images(folder: Path | None, synthetic: bool, batch_size: int, img_size: int, seed: int) -> tuple[Tensor, str]:
    """A float32 batch ``(batch_size, 3, img_size, img_size)`` and its origin in words.

    Every image is a crop of one photograph at a random position, scale and aspect ratio.

    Raises:
        UsageError: There are no photographs to crop.
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
    if not folder.is_dir():
        raise UsageError(f"--images: {str(folder)!r} is no folder; pass one that holds images, at any depth")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    random.Random(seed).shuffle(files)
    photographs: list[Image.Image] = []
    unreadable = 0
    for path in files:
        if len(photographs) == _MAX_PHOTOGRAPHS:
            break
        try:
            with Image.open(path) as image:
                image.thumbnail((1024, 1024))  # a folder of camera files must not fill the memory
                photographs.append(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            unreadable += 1
    if not photographs:
        detail = f"{unreadable} files, none of them readable" if files else "none"
        raise UsageError(f"--images: {str(folder)!r} holds {detail}; accepted: {', '.join(IMG_EXTENSIONS)}")
    skipped = f", {unreadable} unreadable files skipped" if unreadable else ""
    return photographs, f"crops of {len(photographs)} images in {folder}{skipped}"


def loader_for(folder: Path, img_size: int, device: torch.device) -> Callable[[int, torch.dtype], Tensor]:
    """A function that returns the next batch of ``folder``, of so many images in that dtype, on the device.

    The images are read, decoded, resized and cropped by timm's loader for evaluation, in processes of their own,
    over and over.

    Raises:
        UsageError: (By the function) the folder holds less than a batch.
    """
    dataset = create_dataset("", root=str(folder))
    streams: dict[int, Iterator[Tensor]] = {}

    def stream(batch_size: int) -> Iterator[Tensor]:
        if len(dataset) < batch_size:
            raise UsageError(
                f"--images: {str(folder)!r} holds {len(dataset)} images, less than a batch of {batch_size}"
            )
        loader = create_loader(
            dataset,
            input_size=(3, img_size, img_size),
            batch_size=batch_size,
            is_training=False,
            use_prefetcher=device.type == "cuda",
            num_workers=min(8, os.cpu_count() or 1),
            device=device,
        )
        while True:
            for images, _ in loader:
                if len(images) == batch_size:
                    yield images

    def fetch(batch_size: int, dtype: torch.dtype) -> Tensor:
        if batch_size not in streams:
            streams[batch_size] = stream(batch_size)
        return next(streams[batch_size]).to(device, dtype)

    return fetch
