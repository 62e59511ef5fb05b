"""What systems are judged on: prompts and noise that no pair has, the same for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import ml_collections
import numpy as np

from d2g_jax import records
from d2g_jax.digits import captions
from d2g_jax.inputs.arrays import read_array
from d2g_jax.pipeline.conditioning import tokenize_prompts
from d2g_jax.pipeline.draw import Programs, draw
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.runtime import atomic
from d2g_jax.runtime.errors import UserError
from d2g_jax.sample import sampler as sample


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """N prompts with their noise, and how they are drawn.

    Attributes:
      prompts: with the labels that they were built from.
      protocol: how prompts and noise were drawn, in words, for a result file.
      noise: float32 (N, C, h, w); the pairs' has another seed.
      input_ids: int32 (N, L).
      batch_size: images per call, a multiple of the mesh's devices.
    """

    prompts: Sequence[captions.Prompt]
    protocol: dict[str, str]
    noise: np.ndarray
    input_ids: np.ndarray
    batch_size: int
    mesh: jax.sharding.Mesh

    @classmethod
    def make(cls, config: ml_collections.ConfigDict, pipeline: Pipeline, mesh: jax.sharding.Mesh) -> HeldOut:
        """By `config.evaluation`; the noise's seed is the one after the sum of the config's and the pairs'."""
        e, seed = config.evaluation, config.seed + 1 + config.pairs.seed
        prompts = captions.evaluation_prompts(e.samples, e.seed, e.grounds)
        noise = sample.draw_noise(seed, e.samples, sample.latent_shape(pipeline))
        ids = tokenize_prompts(pipeline, [p.prompt for p in prompts])
        about = f"{e.samples} captions of {', '.join(e.grounds)}, drawn with seed {e.seed}"
        protocol = {"prompts": about, "noise": f"held out, seed {seed}"}
        return cls(prompts, protocol, noise, ids, e.batch_size, mesh)

    def solve(self, programs: Programs) -> np.ndarray:
        """The scaled latents (N, C, h, w) of a system."""
        batches = draw(programs, self.mesh, self.noise, self.input_ids, self.batch_size, images=False)
        return np.concatenate([batch.latents for batch in batches])


def latents_of_pairs(folder: Path, count: int) -> np.ndarray:
    """The teacher's scaled latents on other noise and prompts: the first pairs', float32 (at most `count`, C, h, w)."""
    source = records.PairSource(folder, fields=("latents",))
    return np.stack([source[i]["latents"] for i in range(min(count, len(source)))]).astype(np.float32)


def cached(file: Path, held_out: HeldOut, programs: Callable[[], Programs]) -> np.ndarray:
    """What `held_out.solve(programs())` gives, from `file`, where it is written first if need be.

    Raises `UserError` for a file that holds something else.
    """
    if not file.exists():
        atomic.write_array(file, held_out.solve(programs()))
    latents = read_array(file, "another, or remove it to draw again")
    if latents.shape != held_out.noise.shape:
        raise UserError(f"{file}: holds {latents.shape}, not {held_out.noise.shape}; remove it to draw again")
    return latents
