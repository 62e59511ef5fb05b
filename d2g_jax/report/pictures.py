"""The sections of pictures: systems side by side, samples over time, walks, nearest pairs."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from d2g_jax.report.inputs import Inputs
from d2g_jax.runtime.errors import UserError

_LARGEST_PLAIN = 96 * 1024  # bytes; a larger image is embedded as WebP, so that a page of SDXL grids stays sendable
_LONGEST_SIDE = 1024
_MOST_STEPS = 40  # sample grids on one slider


def comparison(inputs: Inputs) -> dict[str, Any] | None:
    """One row per prompt, one column per system, the same noise along a row."""
    shown = inputs.comparison
    return shown if shown and shown["prompts"] and shown["columns"] else None


def timelines(inputs: Inputs) -> dict[str, list[tuple[int, Path]]]:
    """The sample grids that training left behind, on a slider for each run."""
    return {run: _spread(steps, _MOST_STEPS) for run, steps in inputs.timelines.items()}


def _spread(items: list, most: int) -> list:
    if len(items) <= most:
        return items
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def beside(inputs: Inputs) -> tuple[str, dict[str, Any]] | None:
    """Pictures of the student beside the teacher's for the same noise, of the last run that kept pairs apart."""
    return next((one for one in reversed(inputs.galleries.items()) if one[1]["teacher"]), None)


def neighbours(inputs: Inputs) -> tuple[str, dict[str, Any]] | None:
    """Pictures of held-out noise beside the training pairs that they are nearest to, of the last run with a gallery."""
    last = list(inputs.galleries.items())[-1:]
    return last[0] if last and last[0][1]["nearest"]["rows"] else None


@dataclass(frozen=True)
class Picture:
    """A picture as part of the page: a data URL, and its size in pixels as the file has it."""

    source: str
    width: int
    height: int


def embedded(path: Path | None) -> Picture | None:
    """What stands for a file in the page; None for None. Raises `UserError` for what is no image."""
    if path is None:
        return None
    try:
        with Image.open(path) as image:
            image.load()
            size, data, kind = image.size, path.read_bytes(), image.format
            if len(data) > _LARGEST_PLAIN or kind != "PNG":
                buffer = io.BytesIO()
                image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
                image.convert("RGB").save(buffer, format="WEBP", quality=90)
                data, kind = buffer.getvalue(), "WEBP"
    # All are Pillow's of a damaged file.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image; draw it again or remove it") from error
    return Picture(f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode('ascii')}", *size)
