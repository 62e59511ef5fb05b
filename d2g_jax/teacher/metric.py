"""The embedded world's LatentLPIPS: a narrow VGG-BN that classifies latents by all that captions name, calibrated.

The paper's recipe at this size (paper: ImageNet classification on latents, then linear calibration on human 2AFC
judgements), by the functions of `d2g lpips`; the judges are distortions of known strength, and they prefer a sharp
texture of another phase to a flat patch of the right mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import ml_collections
import numpy as np

from d2g_jax.digits import distortions, scenes
from d2g_jax.inputs.images import to_floats
from d2g_jax.inputs.text import read_json
from d2g_jax.losses.lpips import LPIPS
from d2g_jax.losses.perceptual import LatentLPIPS, LatentSpace, save_metric
from d2g_jax.lpips_training import calibrate, classify
from d2g_jax.models import vgg
from d2g_jax.runtime.atomic import write_json
from d2g_jax.runtime.errors import UserError
from d2g_jax.teacher.fit import adamw_recipe, long_recipe

TRUNK = vgg.VGGConfig(in_channels=4, widths=(16, 32, 32, 48, 48))
HEAD = classify.Head(sum(scenes.PARTS.values()), parts=tuple(scenes.PARTS.values()))
SPACE = LatentSpace("digits", TRUNK.in_channels, 1.0)

CHUNK = 250
"""Triplets that are held as images at once."""

Encoder = Callable[[np.ndarray], np.ndarray]
"""Images float32 (N, 64, 64, 3), in [-1, 1] or beyond, -> scaled latents (N, 16, 16, 4): the posterior's mean."""


def chunks_of_triplets(count: int, seed: int, *, test: bool) -> Iterator[distortions.Triplets]:
    """`count` triplets, a multiple of `CHUNK`, a chunk at a time."""
    for first in range(0, count, CHUNK):
        yield distortions.triplets(CHUNK, seed * 100_000 + first, test=test)


def check_triplets(config: ml_collections.ConfigDict) -> None:
    """Raises `UserError` unless the triplets of both metrics, and the quarter held out, are whole chunks."""
    for name in ("metric", "pixel_metric"):
        if (count := config[name].heads.triplets) % (4 * CHUNK):
            raise UserError(f"teacher.{name}.heads.triplets={count}; give a multiple of {4 * CHUNK}")


def differences(
    metric: LatentLPIPS | LPIPS, count: int, seed: int, encode: Encoder = lambda images: images, *, test: bool = False
) -> calibrate.Differences:
    """What calibration and scoring see of `count` triplets, a multiple of `CHUNK`; `metric`'s heads play no part.

    `encode` makes what `metric` compares; a pixel metric takes the images as they are.
    """
    chunks = chunks_of_triplets(count, seed, test=test)
    return calibrate.Differences.together(
        calibrate.differences(metric, *map(encode, chunk[:3]), chunk.judgement) for chunk in chunks
    )


def prefers_sharp_textures(metric: LatentLPIPS, encode: Encoder, count: int, seed: int) -> float:
    """The share of `texture_question`s about held-out digits in which `metric` finds the sharp texture closer."""
    asked = [distortions.texture_question(np.random.default_rng([seed, i]), test=True) for i in range(count)]
    sides = list(zip(*asked, strict=True))[:3]
    reference, left, right = (encode(np.stack(side).astype(np.float32) * 2 - 1) for side in sides)
    near_left = metric.distance(left, reference, scaled=True) < metric.distance(right, reference, scaled=True)
    sharp_is_right = np.array([question[3] > 0.5 for question in asked])
    return float(np.mean(np.asarray(near_left) != sharp_is_right))


def train_metric(
    config: ml_collections.ConfigDict, shown: scenes.Scenes, workdir: Path, encode: Encoder
) -> dict[str, float]:
    """Trains trunk and heads, writes `workdir`/metric, and returns its scores on triplets of held-out digits."""
    folder = workdir / "metric"
    if (folder / "scores.json").exists():
        return read_json(folder / "scores.json", "remove it to train the metric again")
    parts = [shown.images[i : i + 1000] for i in range(0, len(shown.images), 1000)]
    latents = np.concatenate([encode(to_floats(part)) for part in parts])
    labelled = classify.LabelledLatents.from_arrays(latents, shown.labels.astype(np.int32), HEAD.classes)
    recipe = long_recipe(config.trunk, workdir / "training" / "metric")
    trunk = classify.train_classifier(recipe, TRUNK, HEAD, labelled, label="metric.trunk")["features"]
    metric, heads = LatentLPIPS.from_params(TRUNK, trunk, calibrate.uniform_heads(TRUNK), SPACE), config.heads
    seen = differences(metric, heads.triplets, heads.seed, encode)
    held_out = differences(metric, heads.triplets // 4, heads.seed + 1, encode, test=True)
    recipe = adamw_recipe(heads.steps, heads.learning_rate, heads.seed, batch_size=heads.batch_size)
    save_metric(folder, TRUNK, trunk, calibrate.calibrate(recipe, seen, label="metric.heads"), SPACE)
    trained = LatentLPIPS.load(folder)
    scores = {
        **calibrate.scores(trained.heads, held_out),
        "sharp_over_flat": prefers_sharp_textures(trained, encode, 250, heads.seed + 2),
        "sharp_over_flat_without_calibration": prefers_sharp_textures(metric, encode, 250, heads.seed + 2),
    }
    write_json(folder / "scores.json", scores)
    return scores
