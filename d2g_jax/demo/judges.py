"""Who judges samples of an embedded world: its prompts, an independent network's features, and what is as asked."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ml_collections
import numpy as np

from d2g_jax.digits import captions as digit_captions
from d2g_jax.digits import classifier, data
from d2g_jax.digits import scores as digit_scores
from d2g_jax.digits.world import captions, judge, scenes, scores

Bar = tuple[str, float, float, bool]
"""What is asked, the value found, the bar, and whether more is better."""


class Judge(Protocol):
    """What a judge can say.

    Attributes:
      size: of the images, pixels of a side.
      parts: of a prompt, those that accuracy is told of; "all" is of all together.
      protocol: what decides the figures, by their names.
    """

    size: int
    parts: tuple[str, ...]
    protocol: dict[str, str]

    def prompts(self, count: int, seed: int) -> Sequence[Any]:
        """Each with a `prompt` and the labels that it was made of."""

    def features(self, images: np.ndarray) -> np.ndarray:
        """float64 (N, F) of uint8 images (N, H, W, 3)."""

    def accuracy(self, images: np.ndarray, prompts: Sequence[Any]) -> dict[str, float]:
        """Shares of images that show what their prompts ask for, by part and under "all"."""

    def real(self) -> tuple[np.ndarray, np.ndarray]:
        """Features of real images to compare with, and their digits (N,)."""

    def test(self) -> tuple[np.ndarray, dict[str, float]]:
        """Real uint8 images that nothing was trained on, and their accuracy for what they show."""

    def bars(self, systems: Mapping[str, Any], floors: Mapping[str, float], kinds: Mapping[str, str]) -> list[Bar]:
        """Set beforehand. `kinds`: the names of systems under teacher, mse, e_latent_lpips and full."""


class Digits:
    """The digits' judge: their classifier, and weight and slant measured from the pixels."""

    size = data.SIZE
    parts = ("digit", "weight", "slant")
    protocol: dict[str, str] = {  # noqa: RUF012
        "frechet": "features (64) of the independent digit classifier, 32x32 images as uint8",
        "accuracy": "digit by the classifier; weight and slant measured from the pixels of the image",
    }

    def __init__(self) -> None:
        self._params = classifier.load_classifier()

    def prompts(self, count: int, seed: int) -> list[digit_captions.Prompt]:
        return digit_captions.evaluation_prompts(count, seed)

    def features(self, images: np.ndarray) -> np.ndarray:
        return classifier.features(self._params, images)[0]

    def accuracy(self, images: np.ndarray, prompts: Sequence[digit_captions.Prompt]) -> dict[str, float]:
        asked = [np.array([getattr(p, name) for p in prompts]) for name in self.parts]
        return digit_scores.prompt_accuracy(images, *asked, self._params)

    def real(self) -> tuple[np.ndarray, np.ndarray]:
        train, test = data.load()
        images = np.concatenate([train.images, test.images])
        return self.features(images), np.concatenate([train.labels, test.labels])

    def test(self) -> tuple[np.ndarray, dict[str, float]]:
        _, test = data.load()
        measured = data.attributes(test.images, test.labels)
        accuracy = digit_scores.prompt_accuracy(test.images, test.labels, measured.weight, measured.slant, self._params)
        return np.round((test.images + 1) * 127.5).astype(np.uint8), accuracy

    def bars(self, systems: Mapping[str, Any], floors: Mapping[str, float], kinds: Mapping[str, str]) -> list[Bar]:
        teacher, mse, perceptual, full = (systems[kinds[k]] for k in ("teacher", "mse", "e_latent_lpips", "full"))
        far = "frechet_to_teacher"
        return [
            *((f"teacher: accuracy of {p} at least 0.95", teacher["accuracy"][p], 0.95, True) for p in self.parts),
            (
                "teacher: Frechet distance to real over real against real, at most 3",
                teacher["frechet_to_real"] / floors["real_vs_real"],
                3.0,
                False,
            ),
            (
                "E-LatentLPIPS student: Frechet distance over the MSE student's, at most 1/3",
                perceptual[far] / mse[far],
                1 / 3,
                False,
            ),
            (
                "full student: Frechet distance over the E-LatentLPIPS student's, at most 1",
                full[far] / perceptual[far],
                1.0,
                False,
            ),
            (
                "full student: accuracy of all three together over the teacher's, at least 0.95",
                full["accuracy"]["all"] / teacher["accuracy"]["all"],
                0.95,
                True,
            ),
        ]


class World:
    """The judge of textures and digits: a network that was trained on real scenes alone."""

    size = scenes.SIZE
    parts = tuple(scenes.PARTS)
    protocol: dict[str, str] = {  # noqa: RUF012
        "frechet": "features (64) of the independent judge, 64x64 images as uint8",
        "accuracy": "all parts of the caption by the judge",
    }

    def __init__(self, file: str | Path) -> None:
        self._params = judge.load_judge(file)

    def prompts(self, count: int, seed: int) -> list[captions.Prompt]:
        return captions.evaluation_prompts(count, seed)

    def features(self, images: np.ndarray) -> np.ndarray:
        return judge.judge(self._params, images)[0]

    def accuracy(self, images: np.ndarray, prompts: Sequence[captions.Prompt]) -> dict[str, float]:
        return scores.prompt_accuracy(judge.judge(self._params, images)[1], np.array([p.scene for p in prompts]))

    def real(self) -> tuple[np.ndarray, np.ndarray]:
        shown = scenes.render(2000, 4)
        return self.features(shown.images), shown.labels[:, 0]

    def test(self) -> tuple[np.ndarray, dict[str, float]]:
        shown = scenes.render(2000, 5, test=True)
        found = judge.judge(self._params, shown.images)[1]
        return shown.images, scores.prompt_accuracy(found, np.where(shown.labels < 0, found, shown.labels))

    def bars(self, systems: Mapping[str, Any], floors: Mapping[str, float], kinds: Mapping[str, str]) -> list[Bar]:
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
                full["accuracy"]["all"] / teacher["accuracy"]["all"],
                0.95,
                True,
            ),
        ]


@functools.cache
def _judge(file: str | None) -> Judge:
    return Digits() if file is None else World(file)


def judge_of(config: ml_collections.ConfigDict) -> Judge:
    """That of `config.evaluation`: the world's where it names the judge's weights, else the digits'."""
    return _judge(config.evaluation.get("judge"))
