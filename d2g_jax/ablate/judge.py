"""How a student of the digits teacher is judged: by what it draws, against what the teacher draws."""

from __future__ import annotations

from pathlib import Path

import ml_collections
import numpy as np

from d2g_jax import pairs
from d2g_jax.demo.held_out import HeldOut, cached, latents_of_pairs
from d2g_jax.digits import classifier, data, scores
from d2g_jax.pipeline.draw import decode_all
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.results.frechet import frechet_distance
from d2g_jax.results.unexplained import unexplained
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.errors import UserError
from d2g_jax.sample import sampler as sample


class DigitsJudge:
    """The demo's measures: Frechet distance to the teacher's samples, and how many images are as asked.

    Attributes:
      floor: the distance between the teacher's samples and its samples on other noise and prompts.
      protocol: what decides the figures, by their names.
    """

    def __init__(self, config: ml_collections.ConfigDict, workdir: Path, pairs_folder: Path):
        """Draws the teacher, once for a workdir: WORKDIR/evaluation/teacher.npy.

        Raises `UserError` for too few samples.
        """
        e = config.evaluation
        self._batch_size, self._classifier = e.batch_size, classifier.load_classifier()
        self._mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp)
        teacher = sample.Sampler.load(config.pipeline, self._mesh)
        self._pipeline, solution = teacher.pipeline, pairs.solution(config.pairs)
        self._held_out = HeldOut.make(config, teacher.pipeline, self._mesh)
        solve = lambda: self._held_out.solve(teacher.programs(self._mesh, solution))  # noqa: E731
        self._teacher = cached(workdir / "evaluation" / "teacher.npy", solve)
        self._reference = self._features(self._decode(self._teacher))
        others = latents_of_pairs(pairs_folder, e.samples)
        self.floor = frechet_distance(self._features(self._decode(others)), self._reference)
        self.protocol = self._held_out.protocol | {
            "frechet_to_teacher": f"{e.samples} images of each, features of the independent digit classifier",
            "accuracy": "shares of images whose digit (by the classifier), weight and slant (from pixels) are as asked",
            "floor": f"the same distance to {len(others)} samples of the teacher on other noise and prompts",
            "drawn": "the moving average of the generator at the end of training, one call",
        }

    def score(self, student: Path) -> dict[str, float]:
        """Of the newest moving average in a training workdir."""
        latents = self._held_out.solve(sample.Sampler.load(student, self._mesh).programs(self._mesh))
        images, prompts = self._decode(latents), self._held_out.prompts
        asked = [[getattr(prompt, name) for prompt in prompts] for name in ("digit", "weight", "slant")]
        accuracy = scores.prompt_accuracy(images, *asked, self._classifier)
        return {
            "frechet_to_teacher": scores.distance_to(images, self._reference, self._classifier),
            **{f"accuracy_{name}": value for name, value in accuracy.items()},
            "latent_std": float(np.std(latents)),
            "unexplained": unexplained(latents, self._teacher),
        }

    def _decode(self, latents: np.ndarray) -> np.ndarray:
        return decode_all(self._pipeline, self._mesh, latents, self._batch_size)

    def _features(self, images: np.ndarray) -> np.ndarray:
        return classifier.features(self._classifier, images)[0]


def check_digits(config: ml_collections.ConfigDict) -> None:
    """Raises `UserError` for a teacher whose images the digits' classifier cannot take; reads no weights."""
    pipeline = Pipeline.load(config.pipeline, without=("text_encoder", "text_encoder_2", "unet", "vae"))
    height, width = (pipeline.vae.config.downscale * side for side in pipeline.latent_shape[:2])
    if (height, width) != (data.SIZE, data.SIZE):
        raise UserError(
            f"pipeline={config.pipeline}: draws {height}x{width} pixels, and the classifier that the config's section "
            f"evaluation stands for takes {data.SIZE}x{data.SIZE}; take a config without it, such as configs/sd15.py"
        )
