"""A place on the pad is a noise: which one, how likely, and how near its neighbours."""

import numpy as np
import pytest

from d2g_jax.play import pad
from d2g_jax.sample.sampler import draw_noise

SHAPE = (4, 32, 32)


def test_three_places_are_images_of_sample():
    first, second, third = draw_noise(7, 3, SHAPE)
    np.testing.assert_array_equal(pad.noise_at(7, 0.0, 0.0, SHAPE), first)
    np.testing.assert_array_equal(pad.noise_at(7, 1.0, 0.0, SHAPE), second)
    np.testing.assert_array_equal(pad.noise_at(7, 0.0, 1.0, SHAPE), third)
    np.testing.assert_allclose(pad.noise_at(7, -1.0, 0.0, SHAPE), -second, atol=1e-6)


@pytest.mark.parametrize(("x", "y"), [(0.0, 0.0), (0.5, 0.0), (-0.3, 0.7), (1.0, 1.0), (1e-9, -1e-9)])
def test_every_place_is_standard_normal(x, y):
    """4,096 values: mean within 4 and standard deviation within 4.5 of their own standard errors."""
    assert np.square(pad.weights(x, y)).sum() == pytest.approx(1.0, abs=1e-6)
    noise = pad.noise_at(3, x, y, SHAPE)
    assert noise.dtype == np.float32
    assert abs(noise.mean()) < 4 / 64
    assert abs(noise.std() - 1.0) < 0.05


def test_neighbours_are_alike():
    start = pad.noise_at(0, 0.2, -0.4, SHAPE)
    near, far = pad.noise_at(0, 0.21, -0.4, SHAPE), pad.noise_at(0, -0.9, 0.4, SHAPE)
    assert np.abs(near - start).mean() < 0.02
    assert np.abs(far - start).mean() > 0.5


def test_the_picture_uses_all_levels_equally():
    levels = pad.picture(pad.noise_at(0, 0.3, 0.3, (4, 64, 64)))
    assert levels.shape == (64, 64, 3)
    assert levels.dtype == np.uint8
    counts = np.histogram(levels, bins=4, range=(0, 256))[0]
    assert counts.min() > 0.22 * levels.size
    assert pad.picture(np.zeros((1, 2, 3), np.float32)).tolist() == [[[128] * 3] * 3] * 2
