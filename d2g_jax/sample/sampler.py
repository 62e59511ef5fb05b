"""Drawing images from a pipeline folder at any number of steps, or from a distilled student in one."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from d2g_jax.diffusion import noise
from d2g_jax.diffusion.systems import OneStep, find_system
from d2g_jax.pipeline.conditioning import tokenize_prompts
from d2g_jax.pipeline.draw import Programs, Solution, draw, one_step_programs, teacher_programs
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.pipeline.hub import resolve
from d2g_jax.runtime import atomic
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.grid import grid, save_png
from d2g_jax.sample import exported
from d2g_jax.train.checkpoint import Checkpoints

MAX_SIDE = 8192
"""Pixels of an image: a mistyped side must not take the machine's memory."""


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A pipeline whose `params["unet"]` are to be drawn with, and how they are to be called.

    Attributes:
      pipeline: text towers, UNet, VAE, schedule.
      timestep: of a one-step generator of ours; None for a teacher, which is solved in steps.
      system: how a one-step generator of another method is called; None for ours and for teachers.
    """

    pipeline: Pipeline
    timestep: int | None
    system: OneStep | None = None

    @property
    def one_step(self) -> OneStep | None:
        """How a one-step generator is called; None for a teacher."""
        return self.system if self.timestep is None else OneStep(self.timestep)

    @classmethod
    def load(
        cls,
        model: str | Path,
        mesh: jax.sharding.Mesh,
        dtype: jnp.dtype = jnp.float32,
        storage: jnp.dtype = jnp.float32,
        revision: str | None = None,
        system: str | None = None,
        unet: str | Path | None = None,
    ) -> Sampler:
        """From a folder in diffusers' layout (a teacher, or an exported student), a hub id, or a training workdir.

        Of a workdir the newest average is taken. `dtype`, `storage` and `unet`: see `Pipeline.load`. `system`, a name
        of `systems.SYSTEMS`, says that the folder holds a one-step generator of another method.
        Raises `UserError` for a student of ours with a `system` or a `unet`, as `Pipeline.load` does, and for a folder
        that is neither pipeline nor workdir.
        """
        foreign = None if system is None else find_system(system)
        if Path(model, "checkpoints").is_dir():
            _check_own(model, system, unet)
            return cls._from_workdir(Path(model), mesh, dtype, storage)
        folder = resolve(model, revision)
        if not (folder / "model_index.json").exists():
            raise UserError(f"{model}: neither a pipeline folder (model_index.json) nor a workdir (checkpoints/)")
        described = exported.read_description(folder)
        if described.get("timestep") is not None or described.get("format") == "flax":
            _check_own(model, system, unet)
        if described.get("format") == "flax":
            return cls(exported.load_pipeline(folder, dtype, mesh, storage), described["timestep"])
        pipeline = Pipeline.load(folder, dtype, mesh, storage, unet=unet)
        return cls(pipeline, described.get("timestep"), foreign)

    @classmethod
    def _from_workdir(cls, workdir: Path, mesh: jax.sharding.Mesh, dtype: jnp.dtype, storage: jnp.dtype) -> Sampler:
        with Checkpoints(workdir / "checkpoints") as checkpoints:
            metadata = checkpoints.metadata()
            pipeline = Pipeline.load(metadata["pipeline"], dtype, mesh, storage, without=("unet",))
            unet = checkpoints.restore_ema(meshes.place(pipeline.unet.abstract(), mesh))
        pipeline = dataclasses.replace(pipeline, params={**pipeline.params, "unet": exported.store(unet, storage)})
        return cls(pipeline, metadata["timestep"])

    def programs(
        self,
        mesh: jax.sharding.Mesh,
        solution: Solution | None = None,
        size: tuple[int, int] | None = None,
        *,
        tiled: bool = False,
    ) -> Programs:
        """The compiled calls; `solution` is a teacher's (None: its defaults), `size` the images' (height, width)."""
        if self.one_step is None:
            return teacher_programs(self.pipeline, mesh, solution or Solution(), size, tiled=tiled)
        return one_step_programs(self.pipeline, self.pipeline.params["unet"], self.one_step, mesh, size, tiled=tiled)


def _check_own(model: str | Path, system: str | None, unet: str | Path | None) -> None:
    for flag, value in (("system", system), ("unet", unet)):
        if value is not None:
            raise UserError(f"{model}: a student of d2g_jax, which says itself how it is called; leave out --{flag}")


def latent_shape(pipeline: Pipeline, size: tuple[int | None, int | None] = (None, None)) -> tuple[int, int, int]:
    """(C, h, w) of the latents of images of `size` (height, width) in pixels; None is the native side.

    Raises `UserError` for a side that is no multiple of the VAE's factor, or above `MAX_SIDE`.
    """
    *native, channels = pipeline.latent_shape
    factor, sides = pipeline.vae.config.downscale, []
    for name, pixels, latent in zip(("height", "width"), size, native, strict=True):
        if pixels is not None and pixels not in range(factor, MAX_SIDE + 1, factor):
            raise UserError(
                f"--{name}={pixels} is not a multiple of {factor}, the VAE's factor, from {factor} to {MAX_SIDE}"
            )
        sides.append(latent if pixels is None else pixels // factor)
    return channels, *sides


def draw_noise(seed: int, count: int, shape: tuple[int, int, int]) -> np.ndarray:
    """float32 noise (count, C, h, w) of images 0 to count - 1 under `seed`, the same on every backend."""
    return np.asarray(noise.record_noise(seed, jnp.arange(count, dtype=jnp.uint32), shape))


def read_latents(file: str | Path, count: int, shape: tuple[int, int, int]) -> np.ndarray:
    """float32 (count, C, h, w) from a .npy file, as one would give diffusers in `latents=`."""
    try:
        latents = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as .npy ({error}); give float32 (N, C, h, w)") from error
    if latents.shape != (count, *shape):
        raise UserError(f"{file}: shape {latents.shape}; this model and {count} prompts need {(count, *shape)}")
    if not np.isfinite(latents).all():
        raise UserError(f"{file}: holds values that are not finite; give standard normal noise")
    return latents.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Request:
    """What `d2g sample` is asked for.

    Attributes:
      prompts: one or more; images_per_prompt of each.
      solution: a teacher's; a one-step student has none.
      size: (height, width) in pixels, None for the native side.
      seed: of the noise; `latents`, a .npy file, takes its place.
      batch_size: images per call, rounded up to the devices.
      dtype: what the networks compute in and what their kernels are kept in.
      tiled: decode large images in overlapping tiles, for devices that cannot hold one image's activations.
      system: of `systems.SYSTEMS`, for a one-step generator of another method.
      unet: weights in place of the folder's own UNet.
    """

    prompts: tuple[str, ...]
    images_per_prompt: int = 1
    solution: Solution | None = None
    size: tuple[int | None, int | None] = (None, None)
    seed: int = 0
    latents: Path | None = None
    batch_size: int = 64
    dtype: str = "float32"
    tiled: bool = False
    system: str | None = None
    unet: Path | None = None


def sample(model: str | Path, request: Request, out: Path, revision: str | None = None) -> dict[str, float]:
    """Draws and writes 00000.png ..., grid.png, noise.npy, latents.npy and prompts.txt into `out`.

    Returns seconds: "load", "compile" (the first batch, which is drawn again), and "text", "unet" and "vae" apart.

    Raises `UserError` for bad requests, and for latents that are not finite; then nothing is written.
    """
    if not request.prompts:
        raise UserError("no prompts; give --prompt=TEXT or --prompts=FILE")
    for name in ("images_per_prompt", "batch_size"):
        if getattr(request, name) < 1:
            raise UserError(f"{name}={getattr(request, name)}; it must be at least 1")
    start, dtype = time.monotonic(), jnp.dtype(request.dtype)
    mesh = meshes.make_mesh()
    sampler = Sampler.load(model, mesh, dtype, dtype, revision, request.system, request.unet)
    if sampler.one_step is not None and request.solution is not None:
        raise UserError(f"{model}: this is a one-step student; leave out --steps, --guidance, --solver and --negative")
    prompts = [prompt for prompt in request.prompts for _ in range(request.images_per_prompt)]
    shape = latent_shape(sampler.pipeline, request.size)
    if request.latents is None:
        drawn = draw_noise(request.seed, len(prompts), shape)
    else:
        drawn = read_latents(request.latents, len(prompts), shape)
    factor = sampler.pipeline.vae.config.downscale
    programs = sampler.programs(mesh, request.solution, (factor * shape[1], factor * shape[2]), tiled=request.tiled)
    ids = tokenize_prompts(sampler.pipeline, prompts)
    devices = meshes.batch_shards(mesh)
    batch_size = -(-min(request.batch_size, len(prompts)) // devices) * devices

    loaded, seconds = time.monotonic(), {}
    for _ in draw(programs, mesh, drawn[:batch_size], ids[:batch_size], batch_size, images=True):
        pass
    compiled = time.monotonic()
    batches = list(draw(programs, mesh, drawn, ids, batch_size, images=True, seconds=seconds))
    latents, images = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    finite = np.isfinite(latents).reshape(len(latents), -1).all(axis=1)
    if not finite.all():
        raise UserError(
            f"{model}: {np.count_nonzero(~finite)} of {len(latents)} images are not finite, the first for "
            f"{prompts[int(np.argmin(finite))]!r}; check its weights, or give --dtype=float32"
        )
    for i, image in enumerate(images):
        save_png(out / f"{i:05d}.png", image)
    save_png(out / "grid.png", grid(images, max(1, int(np.ceil(np.sqrt(len(images)))))))
    atomic.write_array(out / "noise.npy", drawn)
    atomic.write_array(out / "latents.npy", latents)
    atomic.write_text(out / "prompts.txt", "\n".join(prompts) + "\n")
    return {"load": loaded - start, "compile": compiled - loaded, **seconds}
