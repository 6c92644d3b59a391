"""Find image files, and read images of any kind as 8-bit RGB or grey."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# A folder is searched for files with these suffixes; a file that is named itself may have any.
_PHOTOS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff")
SUFFIXES = (*_PHOTOS, ".jp2", ".j2k", ".tga", ".ppm", ".pgm", ".pbm", ".pnm")
_MAX_ASPECT = 200  # the shorter side is scaled to the model's size: a longer image could fill the memory


class ImageError(Exception):
    """A file cannot be read as an image; the message is the reason, without the file's name."""


@dataclass(frozen=True)
class Failure:
    """A file or pattern without an image, and the reason."""

    file: str
    reason: str


def find_images(names: Iterable[str]) -> tuple[list[str], list[Failure]]:
    """The files that ``names`` stand for, each once, and the names without any file.

    A name is a file, a folder (searched recursively for images; hidden files and folders are skipped) or a glob
    (``**`` included). Files are sorted within each folder and glob.
    """
    files: dict[str, None] = {}
    failures: list[Failure] = []
    for name in names:
        matches = (
            [name] if os.path.lexists(name) or not glob.has_magic(name) else sorted(glob.glob(name, recursive=True))
        )
        if not matches:
            failures.append(Failure(name, "no file matches"))
        for match in matches:
            if not os.path.isdir(match):
                files[match] = None
                continue
            found, unreadable = _search_folder(match)
            files.update(dict.fromkeys(found))
            failures += unreadable
            if not found and match == name:
                failures.append(Failure(match, "no images in this folder"))
    return list(files), failures


def _search_folder(folder: str) -> tuple[list[str], list[Failure]]:
    unreadable: list[Failure] = []

    def note(error: OSError) -> None:
        unreadable.append(Failure(str(error.filename), str(error.strerror)))

    found = []
    for directory, folders, names in os.walk(folder, onerror=note):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            os.path.join(directory, name)
            for name in sorted(names)
            if not name.startswith(".") and name.lower().endswith(SUFFIXES)
        ]
    return found, unreadable


def read_image(path: str | os.PathLike[str], grey: bool = False) -> Image.Image:
    """Read the first frame of an image file, upright, as 8-bit RGB (or grey, mode ``L``).

    EXIF orientation is applied. Transparent pixels become white. 16-bit values, and floats in 0..1, are scaled to 8
    bits without clipping. CMYK, palettes and all other modes of Pillow are converted to RGB.

    Raises:
        ImageError: The file does not exist, is not a regular file or not an image, is damaged or too large (Pillow's
            limit against decompression bombs), or its sides differ by more than 200 times.
    """
    try:
        if not stat.S_ISREG(mode := os.stat(path).st_mode):  # reading a FIFO may block forever
            raise ImageError("a directory" if stat.S_ISDIR(mode) else "not a regular file")
        with Image.open(path, formats=_formats()) as image:
            rgb = _to_rgb(_upright(image))
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError("no such file") from error
    except UnidentifiedImageError as error:
        empty = os.path.getsize(path) == 0
        raise ImageError("the file is empty" if empty else "not an image in a format that Pillow reads") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"too large: {error}") from error
    except Exception as error:  # Pillow's decoders raise anything on a damaged file
        if isinstance(error, OSError) and error.strerror:
            raise ImageError(error.strerror) from error
        raise ImageError(f"cannot be decoded: {error or type(error).__name__}") from error
    width, height = rgb.size
    if max(width, height) > _MAX_ASPECT * min(width, height):
        raise ImageError(f"{width} x {height} pixels: too narrow, the sides differ by more than {_MAX_ASPECT} times")
    return rgb.convert("L") if grey else rgb


def _formats() -> list[str]:
    """Pillow's formats except PostScript, for which Pillow would run another program on the file."""
    Image.init()
    return [name for name in Image.OPEN if name != "EPS"]


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # an image with a broken EXIF block is still an image
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba)
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """A grey image of mode I;16 (any byte order), I or F in mode L: 65535, or 1.0, becomes 255."""
    values = np.asarray(image, dtype=np.float64)
    white = 1.0 if image.mode == "F" else 65535.0
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= white):
        raise ImageError(f"values from {low:g} to {high:g} in mode {image.mode}; expected 0 to {white:g}")
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
