"""The judge of the embedded world, trained on real scenes alone."""

from __future__ import annotations

from pathlib import Path

import jax
import ml_collections
import numpy as np

from d2g_jax.digits import judge, scenes
from d2g_jax.digits.scores import prompt_accuracy
from d2g_jax.inputs.images import to_floats
from d2g_jax.lpips_training import fit as training
from d2g_jax.lpips_training.classify import cross_entropy
from d2g_jax.lpips_training.fit import sampled_rows
from d2g_jax.models.network import Params
from d2g_jax.teacher.fit import long_recipe


def train_judge(config: ml_collections.ConfigDict, shown: scenes.Scenes, folder: Path) -> Params:
    """Cross-entropy over all parts of the caption; scenes are mirrored by no one, since slants would change."""
    network, parts = judge.build(), tuple(scenes.PARTS.values())

    def loss(params: Params, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        _, logits = network.apply(params, batch["images"])
        return cross_entropy(logits, batch["labels"], parts)

    def batch_at(step: int) -> dict[str, np.ndarray]:
        rows = sampled_rows(len(shown.images), config.batch_size, config.seed, step)
        return {"images": to_floats(shown.images[rows]), "labels": shown.labels[rows].astype(np.int32)}

    start = network.init(jax.random.key(config.seed))
    return training.fit(loss, start, batch_at, long_recipe(config, folder), label="judge")


def accuracy(params: Params, shown: scenes.Scenes) -> dict[str, float]:
    """On scenes, by part of the caption; a part that is unclear counts as right, since no caption would name it."""
    return prompt_accuracy(judge.judge(params, shown.images)[1], shown.labels)
