"""A stream of batches from a folder, read, decoded and cropped by timm's loader in worker processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, create_loader
from torch import Tensor
from torch.utils.data import IterableDataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from t2t_fast.usage import UsageError

_PREFETCH = 2  # batches that each worker prepares ahead; torch's default


def find_shards(folder: Path) -> list[str]:
    """The WebDataset shards (.tar) in ``folder``, at any depth.

    Raises:
        UsageError: There is no such folder.
    """
    if not folder.is_dir():
        raise UsageError(
            f"--images: {str(folder)!r} is no folder; pass one that holds images, or WebDataset shards, at any depth"
        )
    return sorted(map(str, folder.rglob("*.tar")))


class Shards(IterableDataset[Any]):
    """The images in WebDataset shards, divided among worker processes; unreadable ones are skipped.

    Args:
        files: Paths of the shards.
        repeat: Start again after the last shard.

    Attributes:
        transform: Applied to each image. timm's loader sets it; items are then pairs of image and label 0.
    """

    def __init__(self, files: list[str], repeat: bool = False) -> None:
        self.files, self.repeat, self.transform = files, repeat, None

    def __iter__(self) -> Iterator[Any]:
        try:
            import webdataset
        except ImportError as error:
            raise UsageError("--images: reading .tar shards takes a package: pip install webdataset") from error
        skip = webdataset.ignore_and_continue
        samples = webdataset.WebDataset(self.files, shardshuffle=False, handler=skip).decode("pilrgb", handler=skip)
        for sample in samples.repeat() if self.repeat else samples:
            for name, image in sample.items():
                if f".{name.rpartition('.')[2].lower()}" in IMG_EXTENSIONS:
                    yield image if self.transform is None else (self.transform(image), 0)
                    break


class Loader:
    """Batches of the images in a folder, repeated without end.

    Args:
        folder: Folder with images or WebDataset shards, also in subfolders.
        img_size: Height and width of the crops.
        device: Device of the batches.

    Attributes:
        ahead: The largest number of batches that the workers prepare ahead.
    """

    def __init__(self, folder: Path, img_size: int, device: torch.device) -> None:
        self.folder, self.img_size, self.device = folder, img_size, device
        self.shards = find_shards(folder)
        self.workers = max(1, min(8, os.cpu_count() or 1, len(self.shards) or 8))
        self.ahead = _PREFETCH * self.workers + 1
        self._streams: dict[int, Iterator[Tensor]] = {}

    def next(self, batch_size: int, dtype: torch.dtype) -> Tensor:
        """The next batch, (batch_size, 3, img_size, img_size), in ``dtype`` on the device.

        Raises:
            UsageError: The folder holds fewer images than a batch.
        """
        if batch_size not in self._streams:
            self._streams[batch_size] = self._stream(batch_size)
        return next(self._streams[batch_size]).to(self.device, dtype)

    def _stream(self, batch_size: int) -> Iterator[Tensor]:
        if self.shards:
            dataset: Any = Shards(self.shards, repeat=True)
        else:
            dataset = create_dataset("", root=str(self.folder))
            if len(dataset) < batch_size:
                raise UsageError(
                    f"--images: {str(self.folder)!r} holds {len(dataset)} images, less than a batch of {batch_size}"
                )
        loader = create_loader(
            dataset,
            input_size=(3, self.img_size, self.img_size),
            batch_size=batch_size,
            is_training=False,
            use_prefetcher=self.device.type == "cuda",
            num_workers=self.workers,
            device=self.device,
        )
        while True:
            for images, _ in loader:
                if len(images) == batch_size:
                    yield images
