"""The digits' LatentLPIPS: a narrow VGG-BN classifier on latents, its heads calibrated on distortion triplets.

The paper's recipe at this size (paper: ImageNet classification on latents, then linear calibration on human 2AFC
judgements): the classes are digit x weight x slant, and the judges are distortions of known strength.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from d2g_jax.atomic import write_text
from d2g_jax.digits import classifier, data, distortions
from d2g_jax.digits.fit import fit, sampled_rows
from d2g_jax.models import vgg
from d2g_jax.models.network import Params
from d2g_jax.perceptual import LatentLPIPS, LatentSpace, save_metric

TRUNK = vgg.VGGConfig(in_channels=4, widths=(16, 32, 32, 48, 48))
CLASSES = 10 * len(data.WEIGHTS) * len(data.SLANTS)
_LAST_TAP = 2 * 2 * TRUNK.widths[-1]  # of 8x8 latents, after the two pools

Encoder = Callable[[np.ndarray], np.ndarray]
"""Images (N, 32, 32, 3) in [-1, 1] -> scaled latents (N, 8, 8, 4): the posterior's mean."""


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Scaled latents (N, 8, 8, 4) and joint class labels (N,)."""

    latents: np.ndarray
    labels: np.ndarray


def labelled_latents(images: data.Digits, encode: Encoder, rounds: int, seed: int) -> Labelled:
    """Every image under `rounds` random small warps, labelled by what the warped image shows."""
    ink = data.to_ink(images.images).astype(np.float32)
    warp = jax.jit(classifier.augment)
    warped = [np.asarray(warp(ink, jax.random.fold_in(jax.random.key(seed), i))) for i in range(rounds)]
    views, digits = np.concatenate([ink, *warped]), np.tile(images.labels, rounds + 1)
    measured = data.attributes(views, digits)
    labels = (digits * len(data.WEIGHTS) + measured.weight) * len(data.SLANTS) + measured.slant
    return Labelled(encode(data.to_images(views)), labels)


def train_trunk(config: ml_collections.ConfigDict, train: Labelled) -> Params:
    """The classifier's trunk with the statistics of its batch norms (`vgg.build_training`'s whole tree)."""
    network = vgg.build_training(TRUNK)
    key = jax.random.key(config.seed)
    trunk, statistics = vgg.split_statistics(network.init(key))
    head = 0.01 * jax.random.normal(jax.random.fold_in(key, 1), (_LAST_TAP, CLASSES))

    def forward(params: Params, latents: jax.Array) -> tuple[jax.Array, Params]:
        tree = vgg.merge_statistics(params["trunk"], statistics)
        taps, batch_statistics = network.apply(tree, latents, method="train_features")
        logits = taps[-1].reshape(len(latents), -1) @ params["head"] + params["bias"]
        return logits, batch_statistics

    def loss(params: Params, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        logits, _ = forward(params, batch["latents"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

    def batch_at(step: int) -> dict[str, np.ndarray]:
        rows = sampled_rows(len(train.labels), config.batch_size, config.seed, step)
        return {"latents": train.latents[rows], "labels": train.labels[rows]}

    params = fit(
        loss,
        {"trunk": trunk, "head": head, "bias": jnp.zeros(CLASSES)},
        batch_at,
        steps=config.steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        seed=config.seed,
        label="metric trunk",
    )
    # The statistics of the final weights, averaged over batches, in place of a running average of changing ones.
    measure = jax.jit(lambda params, latents: forward(params, latents)[1])
    batches = [measure(params, batch_at(step)["latents"]) for step in range(64)]
    final = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *batches)
    return vgg.merge_statistics(params["trunk"], final)


def encode_triplets(triplets: distortions.Triplets, encode: Encoder) -> distortions.Triplets:
    """The same triplets as latents."""
    return distortions.Triplets(*(encode(images) for images in triplets[:3]), triplets.judgement)


def head_differences(metric: LatentLPIPS, a: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
    """`metric.channel_differences` of N pairs of scaled latents: (N, C_k) per tap."""
    program = jax.jit(lambda a, b: metric.channel_differences(a, b, scaled=True))
    parts = [jax.device_get(program(a[i : i + 250], b[i : i + 250])) for i in range(0, len(a), 250)]
    return [np.concatenate(tap) for tap in zip(*parts, strict=True)]


def calibrate(config: ml_collections.ConfigDict, trunk: Params, triplets: distortions.Triplets) -> list[np.ndarray]:
    """Non-negative heads by LPIPS' ranking loss (arXiv 1801.03924): a small network judges the two distances."""
    ones = [np.ones(width, np.float32) for width in TRUNK.widths]
    metric = LatentLPIPS.from_params(TRUNK, trunk, ones, _space())
    left = head_differences(metric, triplets.left, triplets.reference)
    right = head_differences(metric, triplets.right, triplets.reference)
    keys = jax.random.split(jax.random.key(config.seed), 3)
    sizes = ((5, 32), (32, 32), (32, 1))
    judge = [
        {"kernel": jax.random.normal(key, size) * np.sqrt(2 / size[0]), "bias": jnp.zeros(size[1])}
        for key, size in zip(keys, sizes, strict=True)
    ]

    def loss(params: Params, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        heads = params["heads"].values()
        d0 = sum(batch[f"left{i}"] @ head for i, head in enumerate(heads))
        d1 = sum(batch[f"right{i}"] @ head for i, head in enumerate(heads))
        x = jnp.stack([d0, d1, d0 - d1, d0 / (d1 + 0.1), d1 / (d0 + 0.1)], axis=-1)
        for i, layer in enumerate(params["judge"]):
            x = x @ layer["kernel"] + layer["bias"]
            x = jax.nn.leaky_relu(x, 0.2) if i < 2 else x
        return optax.sigmoid_binary_cross_entropy(x[:, 0], batch["judgement"]).mean()

    def batch_at(step: int) -> dict[str, np.ndarray]:
        rows = sampled_rows(len(triplets.judgement), config.batch_size, config.seed, step)
        sides = {
            f"{name}{i}": tap[rows] for name, taps in (("left", left), ("right", right)) for i, tap in enumerate(taps)
        }
        return {**sides, "judgement": triplets.judgement[rows]}

    def project(params: Params) -> Params:
        return {**params, "heads": jax.tree.map(lambda head: jnp.maximum(head, 0.0), params["heads"])}

    start = {"heads": {f"{i}": jnp.full(width, 0.1) for i, width in enumerate(TRUNK.widths)}, "judge": judge}
    params = fit(
        loss,
        start,
        batch_at,
        steps=config.steps,
        learning_rate=config.learning_rate,
        seed=config.seed,
        label="metric heads",
        project=project,
    )
    return [params["heads"][f"{i}"] for i in range(len(TRUNK.widths))]


def two_afc(metric: LatentLPIPS, triplets: distortions.Triplets) -> float:
    """Expected agreement with the judges, as LPIPS scores it: the share of judges on the metric's side."""
    heads = [np.asarray(head) for head in metric.heads]
    sides = [
        sum(tap @ head for tap, head in zip(head_differences(metric, x, triplets.reference), heads, strict=True))
        for x in (triplets.left, triplets.right)
    ]
    right_is_closer = sides[1] < sides[0]
    return float(np.mean(np.where(right_is_closer, triplets.judgement, 1 - triplets.judgement)))


def train_metric(config: ml_collections.ConfigDict, folder: Path, encode: Encoder) -> dict[str, float]:
    """Trains trunk and heads, writes the metric folder, and returns its 2AFC scores on triplets of test images."""
    if (folder / "scores.json").exists():
        return json.loads((folder / "scores.json").read_text())
    train, test = data.load()
    trunk = train_trunk(config.trunk, labelled_latents(train, encode, config.trunk.rounds, config.trunk.seed))
    n = config.heads.triplets
    triplets = encode_triplets(distortions.triplets(train.images, config.heads.seed, n), encode)
    held_out = encode_triplets(distortions.triplets(test.images, config.heads.seed + 1, n // 4), encode)
    heads = calibrate(config.heads, trunk, triplets)
    save_metric(folder, TRUNK, trunk, heads, _space())
    uniform = LatentLPIPS.from_params(TRUNK, trunk, [np.ones(w, np.float32) for w in TRUNK.widths], _space())
    scores = {
        "2afc": two_afc(LatentLPIPS.load(folder), held_out),
        "2afc_without_calibration": two_afc(uniform, held_out),
        "2afc_of_judges": float(np.mean(np.maximum(held_out.judgement, 1 - held_out.judgement))),
    }
    write_text(folder / "scores.json", json.dumps(scores, indent=2) + "\n")
    return scores


def _space() -> LatentSpace:
    return LatentSpace("digits", TRUNK.in_channels, 1.0)
