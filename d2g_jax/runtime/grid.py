"""Many small images as one: contact sheets, and PNG files that are either whole or absent."""

from __future__ import annotations

import math
import os

import numpy as np
from PIL import Image

from d2g_jax.runtime.atomic import replacing


def grid(images: np.ndarray, columns: int, padding: int = 2) -> np.ndarray:
    """Lay images out row by row on white.

    images: uint8 (N, H, W, 3), N >= 1. `columns` images stand in a row; a last row that is not full is left white.
    `padding` is the white gap in pixels between neighbours and around the sheet.
    Returns uint8 (rows * (H + padding) + padding, columns * (W + padding) + padding, 3).
    Raises ValueError for another dtype or shape.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(images) == 0:
        raise ValueError(f"images must be uint8 (N >= 1, H, W, 3), not {images.dtype} {images.shape}")
    count, height, width, _ = images.shape
    rows = math.ceil(count / columns)
    cells = np.full((rows * columns, height + padding, width + padding, 3), 255, np.uint8)
    cells[:count, padding:, padding:] = images
    cells = cells.reshape(rows, columns, height + padding, width + padding, 3).swapaxes(1, 2)
    sheet = cells.reshape(rows * (height + padding), columns * (width + padding), 3)
    return np.pad(
        sheet, ((0, padding), (0, padding), (0, 0)), constant_values=255
    )  # (rows*(H+p)+p, columns*(W+p)+p, 3)


def save_png(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Write uint8 (H, W, 3) as a PNG, whole or not at all.

    Makes the parent folders. Raises UserError where the file cannot be written.
    """
    with replacing(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG", optimize=True)
