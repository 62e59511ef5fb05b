"""Drawing images from a pipeline folder at any number of steps, or from a distilled student in one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from d2g_jax import atomic, noise, pairs
from d2g_jax import mesh as meshes
from d2g_jax.checkpoint import Checkpoints
from d2g_jax.diffusion import Schedule, one_step
from d2g_jax.errors import UserError
from d2g_jax.grid import grid, save_png
from d2g_jax.models.network import Params
from d2g_jax.pipeline import Pipeline, decode, tokenize


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A pipeline, the parameters of its generator, and how they are to be called.

    Attributes:
      pipeline: text tower, VAE, schedule and network.
      unet: the parameters to draw with: the teacher's or a student's.
      timestep: of a one-step generator; None for a teacher, which is solved in steps.
    """

    pipeline: Pipeline
    unet: Params
    timestep: int | None

    @classmethod
    def load(cls, model: str | Path, dtype: jnp.dtype = jnp.float32) -> Sampler:
        """From a folder in diffusers' layout (a teacher) or the workdir of `d2g train` (its newest average)."""
        model = Path(model)
        if (model / "model_index.json").exists():
            pipeline = Pipeline.load(model, dtype)
            return cls(pipeline, pipeline.params["unet"], None)
        if not (model / "checkpoints").is_dir():
            raise UserError(f"{model}: neither a pipeline folder (model_index.json) nor a workdir (checkpoints/)")
        with Checkpoints(model / "checkpoints") as checkpoints:
            metadata = checkpoints.metadata()
            pipeline = Pipeline.load(metadata["pipeline"], dtype)
            unet = checkpoints.restore_ema(pipeline.params["unet"])
        return cls(pipeline, unet, metadata["timestep"])


def make_solver(
    sampler: Sampler, mesh: jax.sharding.Mesh, *, steps: int | None, guidance_scale: float, negative_prompt: str = ""
) -> pairs.Solver:
    """One compiled call from noise and tokens to latents; a student's takes one step and no guidance."""
    if sampler.timestep is None:
        pipeline = dataclasses.replace(sampler.pipeline, params={**sampler.pipeline.params, "unet": sampler.unet})
        steps = 50 if steps is None else steps
        return pairs.make_solver(
            pipeline, mesh, steps=steps, guidance_scale=guidance_scale, negative_prompt=negative_prompt
        )
    if steps not in (None, 1):
        raise UserError(f"--steps={steps}: this is a one-step student; leave --steps out")
    return make_generator(sampler, mesh)


def make_generator(sampler: Sampler, mesh: jax.sharding.Mesh) -> pairs.Solver:
    """The student as one compiled program over the mesh."""
    pipeline, timestep = sampler.pipeline, sampler.timestep
    schedule = Schedule.from_config(pipeline.scheduler)
    params = meshes.place({"text_encoder": pipeline.params["text_encoder"], "unet": sampler.unet}, mesh)

    @jax.jit
    def solve(params: dict[str, Params], drawn: jax.Array, input_ids: jax.Array) -> jax.Array:
        text = pipeline.text_encoder.apply(params["text_encoder"], input_ids).last_hidden_state
        call = lambda x, t: pipeline.unet.apply(params["unet"], x, jnp.broadcast_to(t, x.shape[:1]), text)  # noqa: E731
        latents = one_step(call, schedule, timestep, jnp.transpose(drawn, (0, 2, 3, 1)))
        return jnp.transpose(latents, (0, 3, 1, 2))

    return lambda drawn, input_ids: solve(params, drawn, input_ids)


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


def solve(
    solver: pairs.Solver, mesh: jax.sharding.Mesh, drawn: np.ndarray, input_ids: np.ndarray, batch_size: int
) -> np.ndarray:
    """All latents (N, C, h, w) at once, float32."""
    return np.concatenate(list(pairs.solve_in_batches(solver, mesh, drawn, input_ids, batch_size)))


def decode_all(pipeline: Pipeline, latents: np.ndarray, batch_size: int) -> np.ndarray:
    """Scaled latents (N, C, h, w) to uint8 images (N, H, W, 3)."""
    program = jax.jit(lambda params, x: decode(pipeline, params, x))
    batches = []
    for start in range(0, len(latents), batch_size):
        part = latents[start : start + batch_size]
        padded = np.concatenate([part, np.zeros((batch_size - len(part), *part.shape[1:]), part.dtype)])
        images = program({"vae": pipeline.params["vae"]}, padded.transpose(0, 2, 3, 1))
        batches.append(np.asarray(images)[: len(part)])
    return np.concatenate(batches)


def sample(
    model: str | Path,
    prompts: Sequence[str],
    out: Path,
    *,
    images_per_prompt: int = 1,
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    seed: int = 0,
    latents: str | Path | None = None,
    batch_size: int = 64,
) -> dict[str, float]:
    """Draws every prompt and writes 00000.png ..., grid.png, noise.npy, latents.npy and prompts.txt into `out`.

    Returns seconds spent on compilation and first batch, on text and network, and on the VAE.
    """
    if not prompts:
        raise UserError("no prompts; give --prompt=TEXT or --prompts=FILE")
    sampler = Sampler.load(model)
    pipeline = sampler.pipeline
    prompts = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    shape = tuple(np.roll(pipeline.latent_shape, 1))  # (C, h, w)
    drawn = read_latents(latents, len(prompts), shape) if latents else draw_noise(seed, len(prompts), shape)
    mesh = meshes.make_mesh()
    devices = meshes.batch_shards(mesh)
    batch_size = -(-min(batch_size, len(prompts)) // devices) * devices
    solver = make_solver(
        sampler,
        mesh,
        steps=steps,
        guidance_scale=7.5 if guidance_scale is None else guidance_scale,
        negative_prompt=negative_prompt,
    )
    ids = tokenize(pipeline.tokenizer, prompts)
    start = time.monotonic()
    solve(solver, mesh, drawn[:batch_size], ids[:batch_size], batch_size)
    compiled = time.monotonic()
    solved = solve(solver, mesh, drawn, ids, batch_size)
    networks = time.monotonic()
    images = decode_all(pipeline, solved, batch_size)
    done = time.monotonic()
    for i, image in enumerate(images):
        save_png(out / f"{i:05d}.png", image)
    save_png(out / "grid.png", grid(images, max(1, int(np.ceil(np.sqrt(len(images)))))))
    atomic.write_array(out / "noise.npy", drawn)
    atomic.write_array(out / "latents.npy", solved)
    atomic.write_text(out / "prompts.txt", "\n".join(prompts) + "\n")
    return {"compile": compiled - start, "text_and_unet": networks - compiled, "vae": done - networks}
