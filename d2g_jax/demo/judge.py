"""Who judges samples of the embedded teacher: its prompts, an independent network's features, and what is as asked."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from d2g_jax.digits import captions, judge, scenes, scores
from d2g_jax.digits.judge import FEATURES
from d2g_jax.digits.textures import KINDS
from d2g_jax.runtime.errors import UserError

Bar = tuple[str, float, float, bool]
"""What is asked, the value found, the bar, and whether more is better."""


class Judge:
    """A network that was trained on real scenes alone."""

    size = scenes.SIZE
    parts = tuple(scenes.PARTS)
    protocol: dict[str, str] = {  # noqa: RUF012
        "frechet": "features (64) of the independent judge, 64x64 images as uint8",
        "accuracy": "all parts of the caption by the judge",
    }

    def __init__(self, file: str | Path) -> None:
        self._params = judge.load_judge(file)

    def prompts(self, count: int, seed: int, grounds: Sequence[str]) -> list[captions.Prompt]:
        """Each with a `prompt` and the labels that it was made of."""
        return captions.evaluation_prompts(count, seed, grounds)

    def see(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features float64 (N, 64) of uint8 images (N, 64, 64, 3), and what is seen there, labels int64 (N, 7)."""
        return judge.judge(self._params, images)

    def accuracy(self, seen: np.ndarray, prompts: Sequence[captions.Prompt]) -> dict[str, float]:
        """Shares of images, by what is seen there, that show what their prompts ask for: by part and under "all"."""
        return scores.prompt_accuracy(seen, np.array([p.scene for p in prompts]))

    def real(self) -> tuple[np.ndarray, np.ndarray]:
        """Features of real images to compare with, and their digits (N,)."""
        shown = scenes.real_scenes()
        return self.see(shown.images)[0], shown.labels[:, 0]

    def test(self) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
        """Real uint8 images that nothing was trained on, their features, and their accuracy for what they show."""
        shown = scenes.real_scenes(test=True)
        features, seen = self.see(shown.images)
        return shown.images, features, scores.prompt_accuracy(seen, shown.labels)

    def bars(self, systems: Mapping[str, Any], floors: Mapping[str, float], kinds: Mapping[str, str]) -> list[Bar]:
        """Set beforehand. `kinds`: the names of systems under teacher, mse, e_latent_lpips and full."""
        teacher, mse, perceptual, full = (systems[kinds[k]] for k in ("teacher", "mse", "e_latent_lpips", "full"))
        far = "frechet_to_teacher"
        return [
            *((f"teacher: accuracy of {p} at least 0.9", teacher["accuracy"][p], 0.9, True) for p in self.parts),
            ("MSE student: R at least 0.3", mse["unexplained"], 0.3, True),
            (
                "E-LatentLPIPS student: Frechet distance over the MSE student's, at most 1/2",
                perceptual[far] / mse[far],
                0.5,
                False,
            ),
            (
                "full student: Frechet distance over the E-LatentLPIPS student's, at most 1",
                full[far] / perceptual[far],
                1.0,
                False,
            ),
            ("MSE student: sharpness below 0.7", mse["sharpness"], 0.7, False),
            ("full student: sharpness at least 0.85", full["sharpness"], 0.85, True),
            ("full student: sharpness at most 1.15", full["sharpness"], 1.15, False),
            (
                "full student: accuracy of all parts together over the teacher's, at least 0.95",
                full["accuracy"]["all"] / max(teacher["accuracy"]["all"], 1e-9),  # of a teacher that is never right
                0.95,
                True,
            ),
        ]


@functools.cache
def _judge(file: str) -> Judge:
    return Judge(file)


def judge_of(config: ml_collections.ConfigDict) -> Judge:
    """The one whose weights `config.evaluation` names."""
    return _judge(config.evaluation.judge)


def check_evaluation(config: ml_collections.ConfigDict) -> None:
    """Raises `UserError`, before anything is made, unless the samples of the section `evaluation` can be judged."""
    judge_of(config)
    grounds, known = config.evaluation.grounds, (*KINDS, captions.PLAIN)
    if not grounds or (unknown := [ground for ground in grounds if ground not in known]):
        given = unknown[0] if grounds else "none"
        raise UserError(f"evaluation.grounds: {given} is no ground; give some of {', '.join(known)}")
    for name, count in (("evaluation.samples", config.evaluation.samples), ("pairs.count", config.pairs.count)):
        if count <= FEATURES:
            raise UserError(f"{name}={count}; a Frechet distance needs more than {FEATURES} images")
