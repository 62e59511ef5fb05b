"""`d2g lpips`: classify latents, calibrate on 2AFC triplets, write a metric folder; each stage can be resumed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from d2g_jax.config.ranges import check_ranges
from d2g_jax.inputs.text import read_json
from d2g_jax.losses.perceptual import LatentLPIPS, save_metric
from d2g_jax.lpips_training import cache, calibrate, classify
from d2g_jax.lpips_training.encoder import POSTERIORS, Encoder, sha256_of
from d2g_jax.lpips_training.fit import CHECKPOINT, Recipe
from d2g_jax.lpips_training.image_folders import open_images
from d2g_jax.lpips_training.images import Crop, Images, hold_out
from d2g_jax.lpips_training.latents import cached, in_threads, on_the_fly
from d2g_jax.lpips_training.triplets import TripletFolder, open_triplets
from d2g_jax.models import vgg
from d2g_jax.models.network import Params
from d2g_jax.pipeline import weights
from d2g_jax.runtime import runs
from d2g_jax.runtime.atomic import write_json
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.lock import locked

TRIPLETS_PER_SHARD = 200
SCORES = "scores.json"
DTYPES = ("float32", "bfloat16")


def train_lpips(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains a LatentLPIPS for the latents of `config.pipeline`'s VAE; the same call goes on where one stopped.

    Args:
      config: see `configs/lpips.py` for every field.
      workdir: gets `classification/`, `calibration/`, `config.json` and the result, `metric/`, which
        `LatentLPIPS.load` reads.

    Returns:
      What `metric/scores.json` holds: top-1 accuracy on held-out images, and by kind of distortion the 2AFC score on
      the val triplets with and without calibration, and that of the judges' majority.

    Raises:
      UserError: bad config, images, triplets or cache, a workdir of another config or in use, a loss that is not
        finite.
      KeyboardInterrupt, Terminated: SIGINT or SIGTERM came; what is done has been saved.
    """
    workdir = Path(workdir)
    check_config(config)
    encoder = Encoder.load(config.pipeline, config.encoder.batch_size, jnp.dtype(config.encoder.dtype), config.seed)
    trunk_config = read_trunk(config.trunk, encoder, config.images.size, config.triplets.size)
    crop = Crop(config.images.size, config.images.resize, config.seed)
    images = open_both(config.images, config.seed)
    kinds = {part: open_triplets(config.triplets.folder, part) for part in ("train", "val")}
    with locked(workdir):
        runs.claim(workdir, config)
        scores = workdir / "metric" / SCORES
        if scores.exists():
            return read_json(scores, "remove it to score the metric again")
        train, val = labelled(config.images, images, encoder, crop)
        trunk, accuracy = classification(config, trunk_config, train, val, workdir / "classification")
        space = encoder.space(config.name)
        metric = LatentLPIPS.from_params(trunk_config, trunk, calibrate.uniform_heads(trunk_config), space)
        seen = {
            part: [
                differences(config.triplets, kind, metric, encoder, workdir / "calibration" / part) for kind in folders
            ]
            for part, folders in kinds.items()
        }
        heads = calibration(config, seen["train"], workdir / "calibration")
        save_metric(workdir / "metric", trunk_config, trunk, heads, space)
        saved = LatentLPIPS.load(workdir / "metric").heads
        scored = {
            kind.name: {**calibrate.scores(saved, data), "2afc_triplets": len(kind)}
            for kind, data in zip(kinds["val"], seen["val"], strict=True)
        }
        result = {
            "accuracy": accuracy,
            "accuracy_images": val.count,
            "classes": val.classes,
            **{what: {kind: values[what] for kind, values in scored.items()} for what in next(iter(scored.values()))},
            "environment": runs.environment(),
        }
        write_json(scores, result)
        return result


def check_config(config: ml_collections.ConfigDict) -> None:
    """Raises `UserError` for values that no later step would name."""
    if jax.process_count() > 1:
        raise UserError("d2g lpips runs in one process (with all of its devices); start it on one host")
    check_ranges(config)
    for key in ("encoder", "classification", "calibration"):
        if config[key].batch_size % jax.device_count():
            raise UserError(
                f"{key}.batch_size={config[key].batch_size} is not a multiple of the {jax.device_count()} devices"
            )
    for section, name, known in (
        ("encoder", "dtype", DTYPES),
        ("classification", "dtype", DTYPES),
        ("images", "posterior", POSTERIORS),
        ("triplets", "posterior", POSTERIORS),
    ):
        if (value := config[section][name]) not in known:
            raise UserError(f"{section}.{name}={value!r} is unknown; choose one of {', '.join(known)}")
    if not 0 <= config.classification.dropout < 1:
        raise UserError(f"classification.dropout={config.classification.dropout}; give a share from 0 to below 1")


def read_trunk(config: ml_collections.ConfigDict, encoder: Encoder, *sizes: int) -> vgg.VGGConfig:
    """The trunk for this VAE's channels; `UserError` when images of one of `sizes` give latents that do not fit it."""
    fields = {**config.to_dict(), "in_channels": encoder.config.latent_channels}
    trunk = vgg.VGGConfig.from_json(fields, source="config.trunk")
    step = encoder.config.downscale * 2 ** sum(trunk.pools)
    for key, size in zip(("images.size", "triplets.size"), sizes, strict=True):
        if size < step or size % encoder.config.downscale:
            raise UserError(
                f"{key}={size}; this VAE and trunk need a multiple of {encoder.config.downscale} from {step} on"
            )
    return trunk


def open_both(config: ml_collections.ConfigDict, seed: int) -> tuple[Images, Images] | None:
    """(training, held-out) images; None when the cache alone is to be used."""
    if not config.train:
        if not config.cache:
            raise UserError("images.train is empty; give a folder of class folders, a TFDS folder, or images.cache")
        return None
    train = open_images(config.train, config.train_split)
    if not config.val:
        return hold_out(train, config.held_out, seed)
    val = open_images(config.val, config.val_split)
    if len(val.classes) != len(train.classes) or val.classes != train.classes:
        raise UserError(f"{config.val}: its classes are not those of {config.train}; give the same class folders")
    return train, val


def labelled(
    config: ml_collections.ConfigDict, images: tuple[Images, Images] | None, encoder: Encoder, crop: Crop
) -> tuple[classify.LabelledLatents, classify.LabelledLatents]:
    """(training, held-out) latents: from `config.cache` if it is given, else encoded on the fly.

    Held-out images are cropped plainly and encoded by the posterior's mean.
    """
    train, val = images or (None, None)
    if not config.cache:
        return (
            on_the_fly(train, encoder, crop, config.posterior, augment=True),
            on_the_fly(val, encoder, crop, "mean", augment=False),
        )
    folder, views = Path(config.cache), config.views
    made = (
        cached(folder / "train", train, encoder, crop, config.posterior, views=views, label="encode training images"),
        cached(folder / "val", val, encoder, crop, "mean", views=1, label="encode held-out images"),
    )
    classes = [cache.read_made_from(folder / part)["classes"] for part in ("train", "val")]
    if classes[0] != classes[1]:  # possible where the caches are taken without their images
        raise UserError(f"{folder}: train and val are of other classes; give a cache of one data set")
    return made


def classification(
    config: ml_collections.ConfigDict,
    trunk: vgg.VGGConfig,
    train: classify.LabelledLatents,
    val: classify.LabelledLatents,
    folder: Path,
) -> tuple[Params, float]:
    """Stage one: the trunk with its statistics, and top-1 on `val`; both are kept in `folder`."""
    c, file = config.classification, folder / "classifier.safetensors"
    head = classify.Head(train.classes, c.pool or None, tuple(c.hidden), c.dropout)
    if not file.exists():
        recipe = Recipe(
            classification_optimizer(c, train.count),
            _steps(c.epochs, train.count, c.batch_size),
            c.batch_size,
            config.seed,
            folder,
            c.save_every,
        )
        trained = classify.train_classifier(
            recipe, trunk, head, train, label="classification", dtype=jnp.dtype(c.dtype)
        )
        weights.save_state_dict(weights.to_state_dict(trained), file)
    (folder / CHECKPOINT).unlink(missing_ok=True)
    tree = weights.to_params(
        weights.load_state_dict(file), classify.abstract(trunk, head, train.shape), source=str(file)
    )
    measured = folder / "accuracy.json"
    if not measured.exists():
        value = classify.accuracy(tree, trunk, head, val, c.batch_size)
        write_json(measured, {"accuracy": value})
    return tree["features"], read_json(measured, "remove it to measure the accuracy again")["accuracy"]


def classification_optimizer(config: ml_collections.ConfigDict, count: int) -> optax.GradientTransformation:
    """SGD with momentum and PyTorch's weight decay (added to the gradient), the rate cut every `decay_epochs`."""
    every = _steps(config.decay_epochs, count, config.batch_size)
    rate = optax.exponential_decay(config.learning_rate, every, config.decay, staircase=True)
    return optax.chain(optax.add_decayed_weights(config.weight_decay), optax.sgd(rate, config.momentum))


def differences(
    config: ml_collections.ConfigDict, kind: TripletFolder, metric: LatentLPIPS, encoder: Encoder, folder: Path
) -> calibrate.Differences:
    """What calibration sees of one kind's triplets, encoded and compared once and kept in `folder`/KIND."""
    widths = metric.network.config.widths
    total = sum(widths)
    record = np.dtype([("left", "<f4", (total,)), ("right", "<f4", (total,)), ("judgement", "<f4")])

    def make(rows: range) -> np.ndarray:
        patches = np.stack(in_threads(lambda row: kind.patches(row, config.size), rows))  # (n, 3, size, size, 3)
        ids = 3 * np.asarray(rows)
        sides = [encoder.encode(patches[:, i], config.posterior, ids + i) for i in range(3)]
        judgement = np.asarray([kind.judgement(row) for row in rows], np.float32)
        seen = calibrate.differences(metric, *sides, judgement, encoder.batch_size)
        made = np.empty(len(rows), record)
        made["left"], made["right"] = (np.concatenate(taps, axis=1) for taps in (seen.left, seen.right))
        made["judgement"] = judgement
        return made

    made_from = {
        **encoder.described(),
        "size": config.size,
        "posterior": config.posterior,
        "trunk_sha256": sha256_of(metric.params),
        "files_sha256": kind.sha256,
    }
    shards = cache.build(
        folder / kind.name, made_from, len(kind), TRIPLETS_PER_SHARD, make, label=f"{folder.name} {kind.name}"
    )
    records, ends = np.concatenate(shards.parts), np.cumsum(widths)[:-1]
    left, right = (np.split(records[side], ends, axis=1) for side in ("left", "right"))
    return calibrate.Differences(left, right, records["judgement"])


def calibration(
    config: ml_collections.ConfigDict, seen: Sequence[calibrate.Differences], folder: Path
) -> list[np.ndarray]:
    """Stage two: the heads, from all kinds of training triplets together."""
    c = config.calibration
    together = calibrate.Differences.together(seen)
    count = len(together.judgement)
    constant, decay = (_steps(epochs, count, c.batch_size) for epochs in (c.epochs, c.decay_epochs))
    rate = optax.join_schedules(
        [optax.constant_schedule(c.learning_rate), optax.linear_schedule(c.learning_rate, 0.0, max(decay, 1))],
        [constant],
    )
    recipe = Recipe(optax.adam(rate, *c.betas), constant + decay, c.batch_size, config.seed, folder, c.save_every)
    return calibrate.calibrate(recipe, together, label="calibration")


def _steps(epochs: float, count: int, batch_size: int) -> int:
    return math.ceil(epochs * count / batch_size)
