"""`d2g_jax.load`: a model as a callable from prompts to images."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from d2g_jax.inputs import numbers
from d2g_jax.inputs.text import as_prompt
from d2g_jax.pipeline.conditioning import tokenize_prompts, warn_of_prompts
from d2g_jax.pipeline.draw import Drawn, Programs, Solution, draw
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.errors import UserError
from d2g_jax.sample.folder import digest, worn_by
from d2g_jax.sample.sampler import ONE_STEP, Parts, Sampler, noise_of

DTYPES = ("float32", "bfloat16", "float16")
_SOLUTION = tuple(field.name for field in dataclasses.fields(Solution))


class Model:
    """A teacher, a student or an export that draws; `load` makes one.

        student = d2g_jax.load("runs/demo/students/full")
        images = student(["a red seven on navy and white dots", "a thin green three on plain sky"], seed=0)

    Compiled at the first call of a kind and reused by all later ones: programs are kept for each size and solution, and
    a call is padded to the batch of an earlier one, if that has at most twice its rows. The batch is split over the
    devices of the mesh.

    Attributes:
      sampler: the pipeline and how its UNet is called.
      mesh: the devices that draw.
    """

    def __init__(self, sampler: Sampler, mesh: jax.sharding.Mesh, name: str):
        self.sampler, self.mesh, self._name = sampler, mesh, name
        self._programs: dict[tuple, Programs] = {}
        self._rows: dict[tuple, set[int]] = {}  # batch sizes that each has been called with

    def __call__(self, prompts: str | Sequence[str], **options: Any) -> list[Image.Image]:
        """RGB images of H x W pixels, one per prompt in order (`images` of each, side by side in the list).

        Args:
          prompts: one or more.
          options: those of `d2g sample`, under the same names. Of any model: `seed` (0), `latents` in its place
            (float32 noise (N, C, h, w) or the path of a .npy of it, which says height and width too), `images` of each
            prompt (1), `height` and `width` in pixels (the model's own), `batch` images a call (64), `tiled` decoding.
            Of a teacher alone, the fields of `pipeline.draw.Solution`: `steps` (50), `guidance_scale` (7.5),
            `guidance_rescale`, `negative_prompt`, `solver`, `spacing`.

        Raises:
          UserError: one line that says what is wrong and what to do: a student that is given a teacher's options, sides
            that are no multiple of the VAE's factor, noise of another shape, results that are not finite.
          TypeError: an option that does not exist.
        """
        return [Image.fromarray(image) for image in self._drawn(prompts, options).images]

    def latents(self, prompts: str | Sequence[str], **options: Any) -> np.ndarray:
        """As a call, but not decoded: float32 (N, C, h, w), scaled as diffusion networks take them."""
        return self._drawn(prompts, options, decode=False).latents

    def draw(self, prompts: str | Sequence[str], **options: Any) -> Drawn:
        """As a call, as arrays: `latents` float32 (N, C, h, w) and `images` uint8 (N, H, W, 3)."""
        return self._drawn(prompts, options)

    def _drawn(self, prompts: str | Sequence[str], options: dict[str, Any], *, decode: bool = True) -> Drawn:
        drawing = self.prepare(prompts, **options)
        warn_of_prompts(self.sampler.pipeline, drawing.prompts)
        return self.run(drawing, decode=decode)

    def prepare(
        self,
        prompts: str | Sequence[str],
        part: range | None = None,
        first_noise: int = 0,
        /,
        *,
        seed: int = 0,
        latents: np.ndarray | str | Path | None = None,
        images: int = 1,
        height: int | None = None,
        width: int | None = None,
        batch: int = 64,
        tiled: bool = False,
        **solution: Any,
    ) -> Drawing:
        """What a call will draw with which programs, or `part` of its images; nothing is compiled yet.

        Under a seed, image i has the noise of record `first_noise` + i. Raises as a call does.
        """
        if unknown := [name for name in solution if name not in _SOLUTION]:
            raise TypeError(f"no option {unknown[0]!r}; a teacher's are {', '.join(_SOLUTION)}")
        asked = Solution(**solution) if solution else None
        prompts = [prompts] if isinstance(prompts, str) else prompts if prompts is None else list(prompts)
        if not prompts:
            raise UserError("no prompts; give one or more")
        for name, count in (("images", images), ("batch", batch)):
            numbers.COUNT.check(name, count)
        if asked is not None and self.sampler.one_step is not None:
            raise UserError(f"{self._name}: this is a one-step student; {ONE_STEP}")
        total = len(prompts) * images
        part = range(total) if part is None else part
        prompts = [as_prompt(prompts[i // images], f"prompt {i // images + 1}") for i in part]
        pipeline = self.sampler.pipeline
        noise = noise_of(pipeline, total, (height, width), seed, latents, part, first_noise)
        factor = pipeline.vae.config.downscale
        key = (asked, noise.shape[2] * factor, noise.shape[3] * factor, tiled)
        if key not in self._programs:
            self._programs[key] = self.sampler.programs(self.mesh, asked, key[1:3], tiled=tiled)
        devices = meshes.batch_shards(self.mesh)
        least, most = (-(-count // devices) * devices for count in (min(batch, total), batch))
        known = self._rows.setdefault(key, set())
        rows = min((other for other in known if least <= other <= min(2 * least, most)), default=least)
        return Drawing(prompts, noise, tokenize_prompts(pipeline, prompts), self._programs[key], rows, known)

    def run(self, drawing: Drawing, *, decode: bool = True, seconds: dict[str, float] | None = None) -> Drawn:
        """Draws it. `seconds`: see `pipeline.draw.draw`. Raises `UserError` as `check_finite` does."""
        batches = draw(
            drawing.programs,
            self.mesh,
            drawing.noise,
            drawing.ids,
            drawing.batch_size,
            images=decode,
            seconds=seconds,
            name=self._name,
            prompts=drawing.prompts,
        )
        latents, images = zip(*batches, strict=True)
        drawing.drawn_before.add(drawing.batch_size)
        return Drawn(np.concatenate(latents), np.concatenate(images) if decode else None)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A call's images before they are drawn.

    Attributes:
      prompts: N, one an image.
      noise: float32 (N, C, h, w); ids: int32 (N, T L).
      programs: the compiled calls.
      batch_size: rows a call, a multiple of the devices.
      drawn_before: batch sizes that these programs have drawn.
    """

    prompts: list[str]
    noise: np.ndarray
    ids: np.ndarray
    programs: Programs
    batch_size: int
    drawn_before: set[int]


def load(
    model: str | Path,
    *,
    revision: str | None = None,
    system: str | None = None,
    unet: str | Path | None = None,
    dtype: str = "float32",
    mesh: jax.sharding.Mesh | None = None,
    pipeline: str | Path | None = None,
    prediction: str | None = None,
    tokenizer: str | Path | None = None,
    lora: str | Sequence[str] = (),
) -> Model:
    """A model that draws: a callable from prompts to images.

    Args:
      model: a training workdir (its newest average), an export to diffusers, Flax or a single file, a folder in
        diffusers' layout, a .safetensors file in the original one, or a hub id "owner/name" (`revision` is its branch,
        tag or commit).
      system: how a one-step generator of another method is called, a name of `diffusion.systems.SYSTEMS`.
      unet: safetensors in place of the model's own UNet.
      dtype: "float32", "bfloat16" or "float16": what the networks compute in and what their kernels are kept in.
      pipeline: where a workdir's teacher lies now, if it was moved since the training.
      prediction: of a single file that does not say it: "epsilon" or "v_prediction".
      tokenizer: a tokenizer folder in place of CLIP's own, of a single file.
      lora: LoRA files in diffusers' or kohya's format, put on in their order: "FILE" or "FILE:SCALE".
      mesh: the devices; None is all of them (`runtime.mesh.make_mesh`).

    Raises:
      UserError: one line that says what is wrong with the files and what to do.
    """
    if not isinstance(model, str | os.PathLike):
        raise UserError(f"model {model!r}: give the path of a folder, or a hub id 'owner/name'")
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r}; choose one of {', '.join(DTYPES)}")
    mesh, kind = meshes.make_mesh() if mesh is None else mesh, jnp.dtype(dtype)
    parts = Parts(revision, system, unet, pipeline, prediction, tokenizer, (lora,) if isinstance(lora, str) else lora)
    return Model(Sampler.load(model, mesh, kind, parts), mesh, str(model))


@dataclasses.dataclass(frozen=True)
class Asked:
    """A model and how it is to draw.

    Attributes:
      model, dtype: as `load` takes them.
      parts: what is said of the model.
      options: of a `Model`'s call: "seed", "height", "width", "tiled", "batch", and what is given of a teacher's own.
    """

    model: str
    parts: Parts
    dtype: str
    options: Mapping[str, Any]

    def load(self) -> Model:
        """Raises as `load` does."""
        return load(self.model, dtype=self.dtype, **vars(self.parts))

    def describe(self, loaded: Model, noise: np.ndarray) -> dict[str, Any]:
        """What decides a pixel, but for prompts and noise.

        `noise` is (..., h, w): its sides are all images'.
        """
        pipeline, solution = loaded.sampler.pipeline, None
        if loaded.sampler.one_step is None:
            given = {name: value for name, value in self.options.items() if name in _SOLUTION}
            solution = dataclasses.asdict(Solution(**given) if given else Solution.default(pipeline))
        return {
            "model": self.model,
            "unet_sha256": digest(pipeline.params["unet"]),
            "system": self.parts.system,
            "solution": solution,
            "size": [pipeline.vae.config.downscale * side for side in noise.shape[-2:]],
            "seed": self.options["seed"],
            "dtype": self.dtype,
            **worn_by(pipeline, self.parts.lora),
        }
