"""Images of other people: which files of a folder are images, and 8-bit RGB of them or a word why not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from d2g_jax.runtime.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg")
_OTHERS = (".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif", ".heic")
"""Images too, but none that are read."""
CONTACT_SHEET = "grid.png"
"""What `d2g sample` lays beside its images; no sample of a folder."""
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What PIL raises for a damaged file."""
_MODES = ("RGB", "L", "P", "1", "CMYK")


def image_files(paths: Iterable[Path]) -> Iterator[Path]:
    """The images among `paths`, by their names; none of the hidden files that a Mac lays beside each (`._a.png`).

    Raises `UserError` for images of other formats: whoever counts a folder's images counts those.
    """
    for path in paths:
        if path.name.startswith(".") or path.name == CONTACT_SHEET:
            continue
        if path.suffix.lower() in _OTHERS:
            raise UserError(f"{path}: neither PNG nor JPEG; convert it to PNG or take it out of the folder")
        if path.suffix.lower() in SUFFIXES:
            yield path


def read_rgb(file: Path | IO[bytes], name: object) -> Image.Image:
    """A whole image as RGB; raises `UserError` that calls it `name` for a damaged one and as `check_mode` does."""
    try:
        with Image.open(file) as image:
            check_mode(image, name)
            return image.convert("RGB")
    except UNREADABLE as error:
        raise UserError(f"{name}: not a readable image ({reason(error)}); replace or remove it") from error


def check_mode(image: Image.Image, name: object) -> None:
    """Raises `UserError` where a conversion to RGB would show another picture: 16 bits turn white, hidden colours show.

    `image` need not be loaded.
    """
    transparency = " with transparency" if "transparency" in image.info else ""
    if image.mode not in _MODES or transparency:
        remedy = "give 8-bit RGB or grey without transparency"
        raise UserError(f"{name}: mode {image.mode}{transparency}; {remedy}")


def to_floats(pixels: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [-1, 1], as autoencoders and metrics take images."""
    return pixels.astype(np.float32) / 127.5 - 1.0


def reason(error: Exception) -> str:
    """Why an image cannot be read, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
