"""The embedded world's pixel LPIPS: what the latent metric of `metric` is, on the images themselves.

No VGG weights come with this package, and a network for photographs would be a strange judge of drawn digits. So the
trunk is a narrow VGG-BN that classifies scenes by the labels that the latent metric learns from. Its batch norms are
folded away, because LPIPS has none, and its heads are calibrated on the same distortions of known strength.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import ml_collections
import numpy as np

from d2g_jax.digits import scenes
from d2g_jax.inputs.images import to_floats
from d2g_jax.inputs.text import read_json
from d2g_jax.losses.lpips import LPIPS, SCALE, SHIFT, save_lpips
from d2g_jax.lpips_training import calibrate, classify
from d2g_jax.models import vgg
from d2g_jax.models.network import Params
from d2g_jax.runtime.atomic import write_json
from d2g_jax.teacher.fit import adamw_recipe, long_recipe
from d2g_jax.teacher.metric import HEAD, differences

TRUNK = dataclasses.replace(vgg.PIXELS, widths=(16, 32, 32, 48, 48), batch_norm=True)
"""Four pools: the last tap of a 64x64 image has 4x4 locations."""

SCORES = "scores.json"


def train_pixel_metric(config: ml_collections.ConfigDict, shown: scenes.Scenes, workdir: Path) -> dict[str, float]:
    """Trains trunk and heads, writes `workdir`/lpips for `LPIPS.load`, and returns its scores on held-out triplets.

    `config` has the sections of `teacher.pixel_metric`. A folder with scores is finished and taken as it is.
    """
    folder, heads = workdir / "lpips", config.heads
    if (folder / SCORES).exists():
        return read_json(folder / SCORES, "remove it to train the metric again")

    def take(rows: np.ndarray, step: int) -> dict[str, np.ndarray]:
        return {"latents": normalise(to_floats(shown.images[rows])), "labels": shown.labels[rows]}

    labelled = classify.LabelledLatents(len(shown.images), HEAD.classes, shown.images.shape[1:], take)
    recipe = long_recipe(config.trunk, workdir / "training" / "lpips")
    trained = classify.train_classifier(recipe, TRUNK, HEAD, labelled, label="pixel_metric.trunk")
    plain, params = without_batch_norm(TRUNK, trained["features"])
    metric = LPIPS.from_params(params, calibrate.uniform_heads(plain), plain)
    recipe = adamw_recipe(heads.steps, heads.learning_rate, heads.seed, batch_size=heads.batch_size)
    seen = differences(metric, heads.triplets, heads.seed)
    save_lpips(folder, params, calibrate.calibrate(recipe, seen, label="pixel_metric.heads"), plain)
    scores = score(LPIPS.load(folder), heads)
    write_json(folder / SCORES, scores)
    return scores


def score(metric: LPIPS, config: ml_collections.ConfigDict) -> dict[str, float]:
    """2AFC on a quarter as many triplets of held-out digits as `config` (`teacher.pixel_metric.heads`) trains on.

    With the metric's heads, with uniform ones, and of a judge who always sides with the majority.
    """
    held_out = differences(metric, config.triplets // 4, config.seed + 1, test=True)
    return calibrate.scores(metric.heads, held_out)


def normalise(images: np.ndarray) -> np.ndarray:
    """What LPIPS' trunk sees of images (N, H, W, 3) in [-1, 1]: its scaling layer, float32."""
    return ((images - np.asarray(SHIFT)) / np.asarray(SCALE)).astype(np.float32)


def without_batch_norm(config: vgg.VGGConfig, trunk: Params) -> tuple[vgg.VGGConfig, Params]:
    """The config and parameters of the trunk that LPIPS runs, which computes what `trunk` does.

    `trunk` is `vgg.build_training(config)`'s whole tree. Its convolutions are renumbered: torchvision's feature indices
    count the batch norms.
    """
    folded = vgg.fold_batch_norm(*vgg.split_statistics(trunk))
    plain = dataclasses.replace(config, batch_norm=False)
    slices = zip(vgg.conv_indices(config), vgg.conv_indices(plain), strict=True)
    params = {
        f"slice{s}": {str(new): folded[f"slice{s}"][str(old)] for old, new in zip(*indices, strict=True)}
        for s, indices in enumerate(slices, start=1)
    }
    return plain, params
