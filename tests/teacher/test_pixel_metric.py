"""The embedded pixel LPIPS: the shipped one as a judge, its training from nothing, and the folding in between."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2g_jax.digits import distortions, scenes
from d2g_jax.digits.config import WEIGHTS, get_config
from d2g_jax.inputs.images import to_floats
from d2g_jax.losses.lpips import LPIPS
from d2g_jax.lpips_training import calibrate
from d2g_jax.models import vgg
from d2g_jax.runtime.errors import UserError
from d2g_jax.teacher import metric, pixel_metric

FOLDER = WEIGHTS / "lpips"


@pytest.fixture(scope="module")
def shipped():
    return LPIPS.load(FOLDER)


@jax.jit
def distance(metric, a, b):
    return metric.distance(a, b)


def test_shipped_metric_is_small_and_zero_for_equals(shipped):
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 2**20
    images = to_floats(scenes.render(8, 6, test=True).images)
    assert (distance(shipped, images, images) == 0).all()
    assert (distance(shipped, images, images[::-1]) > 0.01).all()
    assert all((np.asarray(head) >= 0).all() for head in shipped.heads)


def test_stronger_distortions_are_farther(shipped):
    """Of every kind, on average over images; the contrast's and the brightness' directions are drawn alike."""
    images = scenes.render(16, 6, test=True).images / 255
    for kind, (function, _) in enumerate(distortions.KINDS):
        means = []
        for strength in (0.15, 0.5, 1.0):
            rng = np.random.default_rng(0)
            distorted = np.stack([distortions.distort(one, kind, strength, rng) for one in images])
            means.append(float(distance(shipped, *(np.float32(x * 2 - 1) for x in (distorted, images))).mean()))
        assert 0 < means[0] < means[1] < means[2], (function.__name__, means)


@pytest.mark.slow
def test_shipped_scores_are_those_of_the_shipped_weights(shipped):
    stored = json.loads((FOLDER / "scores.json").read_text())
    scores = pixel_metric.score(shipped, get_config().teacher.pixel_metric.heads)
    assert scores == pytest.approx(stored, abs=1e-3)
    assert stored["2afc"] > stored["2afc_without_calibration"]
    assert stored["2afc"] > 0.8


def test_folded_and_renumbered_trunk_computes_the_same():
    """Batch norms far from the identity, so that a wrong pairing of layers shows."""
    config = vgg.VGGConfig(3, (4, 6, 6), (2, 1, 2), (True, True, False), tap="pre_pool")
    rng = np.random.default_rng(0)
    trunk = jax.tree.map(
        lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32) * (0.2 if leaf.ndim == 4 else 1),
        vgg.build_training(config).init(jax.random.key(0)),
    )
    images = jnp.asarray(rng.uniform(-1, 1, (2, 8, 8, 3)), jnp.float32)
    plain, params = pixel_metric.without_batch_norm(config, trunk)
    assert not plain.batch_norm
    expected = vgg.build_training(config).apply(trunk, images)
    for ours, theirs in zip(vgg.build(plain).apply(params, images), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-5)


def test_differences_and_heads_make_the_distance(shipped, monkeypatch):
    monkeypatch.setattr(metric, "CHUNK", 5)
    triplets = list(metric.chunks_of_triplets(10, 0, test=True))
    assert [len(made.judgement) for made in triplets] == [5, 5]
    seen = pixel_metric.differences(shipped, 10, 0, test=True)
    assert [tap.shape for tap in seen.left] == [(10, width) for width in pixel_metric.TRUNK.widths]
    for taps, side in ((seen.left, "left"), (seen.right, "right")):
        summed = sum(tap @ np.asarray(head) for tap, head in zip(taps, shipped.heads, strict=True))
        expected = [distance(shipped, getattr(made, side), made.reference) for made in triplets]
        np.testing.assert_allclose(summed, np.concatenate(expected), rtol=1e-4)
    uniform = calibrate.uniform_heads(shipped.network.config)
    other = LPIPS.from_params(shipped.params, uniform, shipped.network.config)
    for ours, theirs in zip(pixel_metric.differences(other, 10, 0, test=True).left, seen.left, strict=True):
        np.testing.assert_array_equal(ours, theirs)  # whatever the heads are


@pytest.mark.slow
def test_training_from_nothing_writes_a_whole_folder_and_keeps_it(tmp_path):
    config = get_config().teacher.pixel_metric
    with config.unlocked():
        config.trunk.steps, config.trunk.batch_size = 2, 8
        config.heads.steps, config.heads.triplets = 2, 1000
    shown, folder = scenes.render(40, 0), tmp_path / "lpips"
    scores = pixel_metric.train_pixel_metric(config, shown, tmp_path)
    assert {file.name for file in folder.iterdir()} == {file.name for file in FOLDER.iterdir()}
    assert LPIPS.load(folder).network.config == LPIPS.load(FOLDER).network.config
    (folder / "metric.safetensors").unlink()
    assert pixel_metric.train_pixel_metric(config, shown, tmp_path) == scores  # finished: not looked at again
    with pytest.raises(UserError, match=r"metric\.safetensors"):
        LPIPS.load(folder)
