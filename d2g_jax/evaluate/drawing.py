"""A model's images as a folder: drawn once, gone on with when interrupted, and described beside themselves."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2g_jax.diffusion import noise
from d2g_jax.pipeline.conditioning import warn_of_prompts
from d2g_jax.pipeline.images import all_classes
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.grid import save_png
from d2g_jax.runtime.progress import Progress
from d2g_jax.sample.folder import claim, prompts_digest
from d2g_jax.sample.model import Asked


class Painter:
    """A loaded model; draws folder after folder with the same programs. `description` holds what decides a pixel."""

    def __init__(self, asked: Asked):
        """Raises `UserError` as `load` and a `Model`'s call do."""
        self._asked, self._model = asked, asked.load()
        sampler, parts = self._model.sampler, asked.parts
        self._pipeline = sampler.pipeline
        prompt = "" if self._pipeline.classes is None else self.classes(1)[0]
        one = self._model.prepare([prompt], **asked.options)
        self.description: dict[str, Any] = {
            **asked.describe(self._model, one.noise),
            "revision": parts.revision,
            "unet": None if parts.unet is None else str(parts.unet),
            "one_step": None if sampler.one_step is None else dataclasses.asdict(sampler.one_step),
            "network_calls": one.programs.network_calls,
            "noise": noise.IMPLEMENTATION,
            "tiled": asked.options["tiled"] or None,  # null as in folders of before it was written down
        }

    def classes(self, count: int) -> tuple[str, ...]:
        """`count` prompts of a model of images, one class after another. Raises `UserError` for a model of text."""
        classes = self._pipeline.classes
        if classes is None:
            raise UserError(f"{self._asked.model}: is told text; give --prompts=FILE, what is to be drawn")
        return tuple(itertools.islice(itertools.cycle(all_classes(classes)), count))

    def paint(self, prompts: Sequence[str], folder: Path, *, first_noise: int = 0) -> None:
        """Writes 00000.png ... of `prompts` into `folder`; what is there already is not drawn again.

        Image i has the noise of record `first_noise` + i. Raises `UserError` for a folder of another drawing, and as
        `pipeline.draw.check_finite` does.
        """
        self.claim(prompts, folder, first_noise=first_noise)
        warn_of_prompts(self._pipeline, prompts)
        batch_size = self._asked.options["batch"]
        with Progress("draw", len(prompts), "image", beginning="compiling") as progress:
            for first in range(0, len(prompts), batch_size):
                part = range(first, min(first + batch_size, len(prompts)))
                files = [folder / f"{i:05d}.png" for i in part]
                if missing := not all(file.exists() for file in files):
                    drawing = self._model.prepare(prompts, part, first_noise, **self._asked.options)
                    for file, image in zip(files, self._model.run(drawing).images, strict=True):
                        save_png(file, image)
                progress.advance(len(part), made=missing)

    def claim(self, prompts: Sequence[str], folder: Path, *, first_noise: int = 0) -> dict[str, Any]:
        """Makes `folder` that of this drawing; returns its description. Raises `UserError` for another's folder."""
        described = {**self.description, "prompts_sha256": prompts_digest(prompts), "first_noise": first_noise}
        claim(folder, described)
        return described
