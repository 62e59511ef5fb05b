"""A model's images as a folder: drawn once, gone on with when interrupted, and described beside themselves."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from d2g_jax.diffusion import noise
from d2g_jax.pipeline.conditioning import tokenize_prompts, warn_of_prompts
from d2g_jax.pipeline.draw import Drawn, Programs, Solution, draw
from d2g_jax.pipeline.images import all_classes
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.grid import save_png
from d2g_jax.runtime.progress import Progress
from d2g_jax.sample.folder import claim, digest, prompts_digest, worn_by
from d2g_jax.sample.sampler import ONE_STEP, Parts, Sampler, latent_shape


@dataclasses.dataclass(frozen=True)
class Model:
    """What is to be evaluated, and how it draws.

    Attributes:
      model, parts: whatever `Sampler.load` takes.
      solution: a teacher's.
      size: (height, width) in pixels, None for the native side.
      seed: of the noise; image i has the noise of record i, as in `d2g sample`.
      dtype: what the networks compute in and what their kernels are kept in.
      batch_size: images per call, rounded up to the devices.
      tiled: decode large images in overlapping tiles.
    """

    model: str
    parts: Parts = Parts()  # noqa: RUF009 (it is frozen)
    solution: Solution | None = None
    size: tuple[int | None, int | None] = (None, None)
    seed: int = 0
    dtype: str = "float32"
    batch_size: int = 64
    tiled: bool = False


class Painter:
    """A loaded model; draws folder after folder with the same programs. `description` holds what decides a pixel."""

    def __init__(self, model: Model):
        """Raises `UserError` as `Sampler.load` does, and for a solution given to a one-step generator."""
        dtype = jnp.dtype(model.dtype)
        self._model, self._mesh = model, meshes.make_mesh()
        self._sampler = Sampler.load(model.model, self._mesh, dtype, model.parts)
        one_step = self._sampler.one_step
        if one_step is not None and model.solution is not None:
            raise UserError(f"{model.model}: one step only; {ONE_STEP}")
        self._shape = latent_shape(self._sampler.pipeline, model.size)
        factor = self._sampler.pipeline.vae.config.downscale
        size = factor * self._shape[1], factor * self._shape[2]
        solution = None if one_step is not None else model.solution or Solution.default(self._sampler.pipeline)
        self._programs: Programs = self._sampler.programs(self._mesh, solution, size, tiled=model.tiled)
        self.network_calls = self._programs.network_calls
        self.description: dict[str, Any] = {
            "model": model.model,
            "revision": model.parts.revision,
            "unet": None if model.parts.unet is None else str(model.parts.unet),
            "unet_sha256": digest(self._sampler.pipeline.params["unet"]),
            "system": model.parts.system,
            "one_step": None if one_step is None else dataclasses.asdict(one_step),
            "solution": None if solution is None else dataclasses.asdict(solution),
            "network_calls": self.network_calls,
            "size": list(size),
            "seed": model.seed,
            "noise": noise.IMPLEMENTATION,
            "dtype": model.dtype,
            "tiled": model.tiled or None,  # null as in folders of before it was written down
            **worn_by(self._sampler.pipeline, model.parts.lora),
        }

    def classes(self, count: int) -> tuple[str, ...]:
        """`count` prompts of a model of images, one class after another. Raises `UserError` for a model of text."""
        classes = self._sampler.pipeline.classes
        if classes is None:
            raise UserError(f"{self._model.model}: is told text; give --prompts=FILE, what is to be drawn")
        return tuple(itertools.islice(itertools.cycle(all_classes(classes)), count))

    def paint(self, prompts: Sequence[str], folder: Path, *, first_noise: int = 0) -> None:
        """Writes 00000.png ... of `prompts` into `folder`; what is there already is not drawn again.

        Image i has the noise of record `first_noise` + i. Raises `UserError` for a folder of another drawing, and as
        `pipeline.draw.check_finite` does.
        """
        self.claim(prompts, folder, first_noise=first_noise)
        warn_of_prompts(self._sampler.pipeline, prompts)
        devices = meshes.batch_shards(self._mesh)
        batch_size = -(-min(self._model.batch_size, len(prompts)) // devices) * devices
        with Progress("draw", len(prompts), "image", beginning="compiling") as progress:
            for first in range(0, len(prompts), batch_size):
                part = list(prompts[first : first + batch_size])
                files = [folder / f"{first + i:05d}.png" for i in range(len(part))]
                if missing := not all(file.exists() for file in files):
                    drawn = self._draw(part, first_noise + first, batch_size)
                    for file, image in zip(files, drawn.images, strict=True):
                        save_png(file, image)
                progress.advance(len(part), made=missing)

    def claim(self, prompts: Sequence[str], folder: Path, *, first_noise: int = 0) -> dict[str, Any]:
        """Makes `folder` that of this drawing; returns its description. Raises `UserError` for another's folder."""
        described = {**self.description, "prompts_sha256": prompts_digest(prompts), "first_noise": first_noise}
        claim(folder, described)
        return described

    def _draw(self, prompts: list[str], first: int, batch_size: int) -> Drawn:
        records = jnp.arange(first, first + len(prompts), dtype=jnp.uint32)
        drawn = np.asarray(noise.record_noise(self._model.seed, records, self._shape))
        ids = tokenize_prompts(self._sampler.pipeline, prompts)
        named = {"name": self._model.model, "prompts": prompts}
        (batch,) = draw(self._programs, self._mesh, drawn, ids, batch_size, images=True, **named)
        return batch
