"""The digits' LatentLPIPS: a narrow VGG-BN classifier on latents, its heads calibrated on distortion triplets.

The paper's recipe at this size (paper: ImageNet classification on latents, then linear calibration on human 2AFC
judgements), by the functions of `d2g lpips`: the classes are digit x weight x slant, and the judges are distortions of
known strength.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax
import ml_collections
import numpy as np

from d2g_jax.digits import classifier, data, distortions
from d2g_jax.losses.perceptual import LatentLPIPS, LatentSpace, save_metric
from d2g_jax.lpips_training import calibrate, classify
from d2g_jax.lpips_training.fit import Recipe
from d2g_jax.models import vgg
from d2g_jax.runtime.atomic import write_text
from d2g_jax.teacher.fit import adamw_recipe

TRUNK = vgg.VGGConfig(in_channels=4, widths=(16, 32, 32, 48, 48))
HEAD = classify.Head(10 * len(data.WEIGHTS) * len(data.SLANTS))  # linear, on the whole last tap
SPACE = LatentSpace("digits", TRUNK.in_channels, 1.0)

Encoder = Callable[[np.ndarray], np.ndarray]
"""Images (N, 32, 32, 3) in [-1, 1] -> scaled latents (N, 8, 8, 4): the posterior's mean."""


def labelled_latents(images: data.Digits, encode: Encoder, rounds: int, seed: int) -> classify.LabelledLatents:
    """Every image under `rounds` random small warps, labelled by what the warped image shows."""
    ink = data.to_ink(images.images).astype(np.float32)
    warp = jax.jit(classifier.augment)
    warped = [np.asarray(warp(ink, jax.random.fold_in(jax.random.key(seed), i))) for i in range(rounds)]
    views, digits = np.concatenate([ink, *warped]), np.tile(images.labels, rounds + 1)
    measured = data.attributes(views, digits)
    labels = (digits * len(data.WEIGHTS) + measured.weight) * len(data.SLANTS) + measured.slant
    return classify.LabelledLatents.from_arrays(encode(data.to_images(views)), labels, HEAD.classes)


def encode_triplets(triplets: distortions.Triplets, encode: Encoder) -> calibrate.Triplets:
    """The same triplets as latents."""
    return calibrate.Triplets(*(encode(images) for images in triplets[:3]), triplets.judgement)


def train_metric(config: ml_collections.ConfigDict, folder: Path, encode: Encoder) -> dict[str, float]:
    """Trains trunk and heads, writes the metric folder, and returns its 2AFC scores on triplets of test images."""
    if (folder / "scores.json").exists():
        return json.loads((folder / "scores.json").read_text())
    train, test = data.load()
    labelled = labelled_latents(train, encode, config.trunk.rounds, config.trunk.seed)
    trunk = classify.train_classifier(_recipe(config.trunk), TRUNK, HEAD, labelled, label="metric.trunk").trunk
    metric, n = calibrate.uncalibrated(TRUNK, trunk, SPACE), config.heads.triplets
    seen, held_out = (
        calibrate.differences(metric, encode_triplets(distortions.triplets(images, seed, count), encode))
        for images, seed, count in (
            (train.images, config.heads.seed, n),
            (test.images, config.heads.seed + 1, n // 4),
        )
    )
    heads = calibrate.calibrate(_recipe(config.heads), seen, label="metric.heads")
    save_metric(folder, TRUNK, trunk, heads, SPACE)
    scores = {
        "2afc": calibrate.two_afc(LatentLPIPS.load(folder).heads, held_out),
        "2afc_without_calibration": calibrate.two_afc(calibrate.uniform_heads(TRUNK), held_out),
        "2afc_of_judges": calibrate.two_afc_of_judges(held_out.judgement),
    }
    write_text(folder / "scores.json", json.dumps(scores, indent=2) + "\n")
    return scores


def _recipe(config: ml_collections.ConfigDict) -> Recipe:
    return adamw_recipe(
        config.steps,
        config.learning_rate,
        config.seed,
        batch_size=config.batch_size,
        weight_decay=config.get("weight_decay", 0.0),
    )
