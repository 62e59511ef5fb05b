"""`d2g sample`: images of prompts as files, written batch by batch, and the seconds they took."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from d2g_jax.diffusion import noise
from d2g_jax.inputs.arrays import read_array
from d2g_jax.inputs.numbers import COUNT
from d2g_jax.inputs.places import check_room
from d2g_jax.inputs.text import as_prompt
from d2g_jax.pipeline.conditioning import warn_of_prompts
from d2g_jax.pipeline.draw import Drawn
from d2g_jax.runtime import atomic
from d2g_jax.runtime.grid import grid, save_png
from d2g_jax.runtime.progress import Progress
from d2g_jax.sample.folder import check, claim, digest, prompts_digest
from d2g_jax.sample.model import Asked, Drawing, Model

IN_GRID = 100
"""Images that grid.png shows, the first."""
QUICK = 1.0
"""Seconds: a first batch that takes less beside compilation is drawn again for its times."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What `d2g sample` is asked for.

    Attributes:
      prompts: one or more; images_per_prompt of each.
      latents: a .npy file in place of a seed's noise.
      metadata: of each prompt, a line of JSON: the images go to the tree that GenEval's own evaluator reads,
        00000/metadata.jsonl and 00000/samples/00000.png ..., a folder for each prompt. Empty for 00000.png ...
    """

    asked: Asked
    prompts: tuple[str, ...]
    images_per_prompt: int = 1
    latents: Path | None = None
    metadata: tuple[str, ...] = ()

    def image(self, out: Path, i: int) -> Path:
        """Where image `i` of all prompts goes."""
        if not self.metadata:
            return out / f"{i:05d}.png"
        prompt, of_prompt = divmod(i, self.images_per_prompt)
        return out / f"{prompt:05d}" / "samples" / f"{of_prompt:05d}.png"


def sample(request: Request, out: Path) -> dict[str, float]:
    """Draws and writes 00000.png ..., grid.png, noise.npy, latents.npy, prompts.txt and drawing.json into `out`.

    A drawing that was stopped goes on behind its last whole batch. Returns seconds: "load", "compile", and apart from
    them "text", "unet" and "vae", with the start of each program's first call where that is not quick: `_first_batch`.

    Raises `UserError` for bad requests and an `out` that is neither empty nor this drawing's, before anything is drawn,
    and as `pipeline.draw.check_finite` does.
    """
    start = time.monotonic()
    given = None if request.latents is None else read_array(request.latents, "float32 noise (N, C, h, w)")
    loaded = request.asked.load()
    batch_size = request.asked.options["batch"]
    options = {**request.asked.options, "latents": given, "images": request.images_per_prompt}
    one = loaded.prepare(request.prompts, range(1), **options)  # refuses what is wrong with the request
    count = len(request.prompts) * request.images_per_prompt
    COUNT.check("images of all prompts", count)
    shape = (count, *one.noise.shape[1:])
    arrays = {name: _Growing(out / name, shape) for name in ("noise.npy", "latents.npy")}
    check_room(out, sum(a.bytes_to_come for a in arrays.values()), f"noise and latents of {count} images")
    described = {
        **request.asked.describe(loaded, one.noise),
        "first_noise": 0,
        "noise": noise.IMPLEMENTATION if given is None else digest({"latents": given}),
        "tiled": request.asked.options["tiled"],
        "layout": "geneval" if request.metadata else None,
        "prompts_sha256": prompts_digest(_prompts(request)),
    }
    if not check(out, described):
        _write_prompts(out, request)  # what is said of them beside the prompt may have changed since
    warn_of_prompts(loaded.sampler.pipeline, request.prompts)
    loading, seconds = time.monotonic() - start, {"compile": 0.0}
    with Progress("draw", count, "image", beginning="compiling") as progress:
        for first in range(0, count, batch_size):
            part = range(first, min(first + batch_size, count))
            files = [request.image(out, i) for i in part]
            missing = not (all(a.holds(part) for a in arrays.values()) and all(file.exists() for file in files))
            if missing:
                drawing = loaded.prepare(request.prompts, part, **options)
                if "unet" in seconds:
                    drawn = loaded.run(drawing, seconds=seconds)
                else:
                    drawn = _first_batch(loaded, drawing, seconds)
                    claim(out, described)  # now that it has been seen to draw
                    _write_prompts(out, request)
                arrays["noise.npy"].write(first, drawing.noise)
                arrays["latents.npy"].write(first, drawn.latents)
                for file, image in zip(files, drawn.images, strict=True):
                    save_png(file, image)
            progress.advance(len(part), made=missing)
    for array in arrays.values():
        array.finish()
    shown = [np.asarray(Image.open(request.image(out, i))) for i in range(min(count, IN_GRID))]
    save_png(out / "grid.png", grid(np.stack(shown), math.ceil(math.sqrt(len(shown)))))
    return {"load": loading, **seconds}


def _first_batch(loaded: Model, drawing: Drawing, seconds: dict[str, float]) -> Drawn:
    """Draws it and adds its seconds; a quick one is drawn again.

    The first call of a compiled program takes tenths of a second to start, which say nothing of a quick one's speed.
    """
    drawn = loaded.run(drawing, seconds=seconds)
    own = {stage: spent for stage, spent in seconds.items() if stage != "compile"}
    if sum(own.values()) < QUICK:
        seconds.update(compile=sum(seconds.values()), **dict.fromkeys(own, 0.0))
        drawn = loaded.run(drawing, seconds=seconds)
    return drawn


def _prompts(request: Request) -> Iterator[str]:
    """One an image, each in one line."""
    lines = (as_prompt(prompt, "prompt") for prompt in request.prompts)
    return (line for line in lines for _ in range(request.images_per_prompt))


def _write_prompts(out: Path, request: Request) -> None:
    """prompts.txt as `read_prompts` reads it, and what is said of each prompt."""
    for i, line in enumerate(request.metadata):
        atomic.write_text(out / f"{i:05d}" / "metadata.jsonl", f"{line}\n")
    with atomic.replacing(out / "prompts.txt") as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.writelines(f"{prompt}\n" for prompt in _prompts(request))


class _Growing:
    """A float32 .npy file that is written part by part; it gets its name `file` when it is whole."""

    def __init__(self, file: Path, shape: tuple[int, ...]):
        self._file, self._part = file, file.with_name(f".{file.name}.part")
        self._row_bytes = 4 * math.prod(shape[1:])
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
        self._header = header.getvalue()
        self._bytes = len(self._header) + shape[0] * self._row_bytes

    @property
    def _bytes_there(self) -> int:
        found = [file.stat().st_size for file in (self._file, self._part) if file.exists()]
        return found[0] if found else 0

    @property
    def bytes_to_come(self) -> int:
        """What is not on disk yet."""
        return max(self._bytes - self._bytes_there, 0)

    def holds(self, rows: range) -> bool:
        """Whether `rows` are written; they are in order, so that the file's size says it."""
        return self._bytes_there >= len(self._header) + rows.stop * self._row_bytes

    def write(self, first: int, rows: np.ndarray) -> None:
        """`rows` from place `first` on; on disk when this returns. Raises `UserError` when the disk is full."""
        with atomic.writing(self._file):
            if self._file.exists():
                self._file.rename(self._part)
            with self._part.open("r+b" if self._part.exists() else "w+b") as stream:
                stream.write(self._header)
                stream.seek(len(self._header) + first * self._row_bytes)
                stream.write(np.ascontiguousarray(rows, "<f4").tobytes())
                stream.flush()
                os.fsync(stream.fileno())

    def finish(self) -> None:
        if self._part.exists():
            self._part.rename(self._file)
