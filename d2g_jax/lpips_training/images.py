"""Labelled images by row, and how an image becomes a square of pixels."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from d2g_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Images:
    """Labelled images by row.

    Attributes:
      source: the folder, for messages.
      count: rows.
      classes: names in the order of the labels.
      read: row -> (RGB image, label).
      name: row -> what messages call it.
      sha256: of the list of what there is (names, not pixels).
    """

    source: Path
    count: int
    classes: tuple[str, ...]
    read: Callable[[int], tuple[Image.Image, int]]
    name: Callable[[int], str]
    sha256: str


def subset(images: Images, rows: Sequence[int] | np.ndarray) -> Images:
    """Some rows, in the order given."""
    rows = np.asarray(rows)
    digest = hashlib.sha256(images.sha256.encode() + rows.astype("<i8").tobytes()).hexdigest()
    read, name = lambda i: images.read(int(rows[i])), lambda i: images.name(int(rows[i]))
    return dataclasses.replace(images, count=len(rows), read=read, name=name, sha256=digest)


def hold_out(images: Images, share: float, seed: int) -> tuple[Images, Images]:
    """(the rest, a random `share` of the images), always the same for a seed."""
    count = round(images.count * share)
    if not 0 < count < images.count:
        raise UserError(f"images.held_out={share} of {images.count} images leaves one part empty; give another share")
    order = np.random.RandomState(seed).permutation(images.count)  # its stream is frozen, Generator's is not
    return subset(images, np.sort(order[count:])), subset(images, np.sort(order[:count]))


@dataclasses.dataclass(frozen=True)
class Crop:
    """How an image becomes `size` x `size` pixels.

    Attributes:
      size: height and width of the result.
      resize: the short side is brought to this before the plain crop, the centre; 0 crops the image as it is.
      seed: of the random crops.
    """

    size: int
    resize: int
    seed: int

    def __post_init__(self) -> None:
        if self.resize and self.resize < self.size:
            raise UserError(f"images.resize={self.resize} is less than images.size={self.size}, the side of the crop")

    def plain(self, image: Image.Image, name: object) -> np.ndarray:
        """The centre: uint8 (size, size, 3). Raises `UserError` for an image that is smaller (only with resize 0)."""
        width, height = image.size
        if self.resize:
            factor = self.resize / min(width, height)
            image = image.resize((round(width * factor), round(height * factor)), Image.Resampling.BILINEAR)
        self._check(image, name)
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        return np.asarray(image.crop((left, top, left + self.size, top + self.size)))

    def random(self, image: Image.Image, name: object, row: int, view: int) -> np.ndarray:
        """A random part, mirrored half of the time: uint8 (size, size, 3), a function of (seed, row, view).

        With `resize` the part is torchvision's `RandomResizedCrop` (8 to 100% of the area, aspect 3/4 to 4/3), whatever
        the number says; with 0 it has `size` pixels of the image as it is.
        """
        rng = np.random.default_rng([self.seed, row, view])
        if self.resize:
            box = random_box(rng, image.width, image.height)
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        else:
            self._check(image, name)
            left, top = rng.integers(image.width - self.size + 1), rng.integers(image.height - self.size + 1)
            image = image.crop((left, top, left + self.size, top + self.size))
        pixels = np.asarray(image)
        return pixels[:, ::-1] if rng.random() < 0.5 else pixels

    def _check(self, image: Image.Image, name: object) -> None:
        if min(image.size) < self.size:
            raise UserError(
                f"{name}: {image.width}x{image.height} pixels, smaller than the crop of images.size={self.size}; "
                "set images.resize, lower images.size or remove it"
            )


def random_box(rng: np.random.Generator, width: int, height: int) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a random part as torchvision's `RandomResizedCrop` draws it.

    Ten tries with a share of the area in (0.08, 1) and a log-uniform aspect ratio in (3/4, 4/3); then the largest
    centred part whose aspect ratio is within these limits.
    """
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return float(left), float(top), float(left + w), float(top + h)
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2
