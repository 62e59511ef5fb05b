"""How a student of an embedded teacher is judged: by what it draws, against what the teacher draws."""

from __future__ import annotations

from pathlib import Path

import ml_collections
import numpy as np

from d2g_jax import pairs
from d2g_jax.demo.held_out import HeldOut, cached, latents_of_pairs
from d2g_jax.demo.judge import PROTOCOL, accuracy, judge_of
from d2g_jax.digits import scenes
from d2g_jax.digits.judge import judge
from d2g_jax.digits.scores import sharp_energy
from d2g_jax.pipeline.draw import decode_all
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.results.frechet import frechet_distance
from d2g_jax.results.unexplained import unexplained
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.errors import UserError
from d2g_jax.sample import sampler as sample


class StudentJudge:
    """The demo's measures: distance to the teacher's samples, how many images are as asked, R and sharpness.

    Attributes:
      floor: the distance between the teacher's samples and its samples on other noise and prompts.
      protocol: what decides the figures, by their names.
    """

    def __init__(self, config: ml_collections.ConfigDict, workdir: Path, pairs_folder: Path):
        """Draws the teacher, once for a workdir: WORKDIR/evaluation/teacher.npy.

        Raises `UserError` for too few samples.
        """
        e = config.evaluation
        self._batch_size, self._judge = e.batch_size, judge_of(config)
        self._mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp)
        teacher = sample.Sampler.load(config.pipeline, self._mesh)
        self._pipeline, solution = teacher.pipeline, pairs.solution(config.pairs)
        self._held_out = HeldOut.make(config, teacher.pipeline, self._mesh)
        file = workdir / "evaluation" / "teacher.npy"
        self._teacher = cached(file, self._held_out, lambda: teacher.programs(self._mesh, solution))
        drawn = self._decode(self._teacher)
        self._reference, self._sharp = judge(self._judge, drawn)[0], sharp_energy(drawn)
        others = latents_of_pairs(pairs_folder, e.samples)
        self.floor = frechet_distance(judge(self._judge, self._decode(others))[0], self._reference)
        self.protocol = self._held_out.protocol | {
            "frechet_to_teacher": f"{e.samples} images of each, {PROTOCOL['frechet']}",
            "accuracy": f"shares of images that are as asked: {PROTOCOL['accuracy']}",
            "floor": f"the same distance to {len(others)} samples of the teacher on other noise and prompts",
            "drawn": "the moving average of the generator at the end of training, one call",
        }

    def score(self, student: Path) -> dict[str, float]:
        """Of the newest moving average in a training workdir."""
        latents = self._held_out.solve(sample.Sampler.load(student, self._mesh).programs(self._mesh))
        images = self._decode(latents)
        features, seen = judge(self._judge, images)
        shares = accuracy(seen, self._held_out.prompts)
        return {
            "frechet_to_teacher": frechet_distance(features, self._reference),
            **{f"accuracy_{name}": value for name, value in shares.items()},
            "latent_std": float(np.std(latents)),
            "sharpness": sharp_energy(images) / self._sharp,
            "unexplained": unexplained(latents, self._teacher),
        }

    def _decode(self, latents: np.ndarray) -> np.ndarray:
        return decode_all(self._pipeline, self._mesh, latents, self._batch_size)


def check_images(config: ml_collections.ConfigDict) -> None:
    """Raises `UserError` for a teacher whose images the config's judge cannot take; reads no weights of the teacher."""
    pipeline = Pipeline.load(config.pipeline, without=("text_encoder", "text_encoder_2", "unet", "vae"))
    height, width = (pipeline.vae.config.downscale * side for side in pipeline.latent_shape[:2])
    size = scenes.SIZE
    if (height, width) != (size, size):
        raise UserError(
            f"pipeline={config.pipeline}: draws {height}x{width} pixels, and the judge that the config's section "
            f"evaluation stands for takes {size}x{size}; take a config without it, such as configs/sd15.py"
        )
