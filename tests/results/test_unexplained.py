"""R: the share of a map that a student leaves unexplained."""

import numpy as np
import pytest

from d2g_jax.results.unexplained import unexplained


def latents(seed, count=64):
    scale = np.array([1.0, 3.0])[:, None, None]
    return np.random.default_rng(seed).normal(size=(count, 2, 4, 4)) * scale + 5 * scale


def test_the_teachers_own_images_and_their_mean():
    target = latents(0)
    assert unexplained(target, target) == 0
    mean = np.broadcast_to(target.mean(axis=(0, 2, 3), keepdims=True), target.shape)
    assert unexplained(mean, target) == pytest.approx(1)
    assert unexplained(latents(1), target) == pytest.approx(2, rel=0.1)  # another image is worse than none


def test_a_share_of_the_variance_whatever_the_scale_and_the_channels_means():
    target = latents(0)
    centre = target.mean(axis=(0, 2, 3), keepdims=True)
    for scale in (1.0, 100.0):
        half = scale * (centre + (target - centre) / 2)
        assert unexplained(half, scale * target) == pytest.approx(0.25)


def test_targets_without_variance_say_nothing():
    assert np.isnan(unexplained(np.ones((2, 1, 4, 4)), np.ones((2, 1, 4, 4))))
