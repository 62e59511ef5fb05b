"""The noise that one drags: every place on a square pad is one noise, neighbours are alike, all are equally likely.

Three noises of one seed span a sphere. A place (x, y) is an angle r pi / 2 away from the first of them, r = |(x, y)|,
in the direction of the second (x) and the third (y):

    z = cos(r pi/2) z0 + sin(r pi/2) (x z1 + y z2) / r

The squares of the weights add up to 1, so that z of independent standard normal z0, z1, z2 is standard normal itself:
what the generator was trained on, at every place, as with spherical interpolation and unlike a straight mixture.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from scipy.special import ndtr

from d2g_jax.sample.sampler import draw_noise

SEEDS = 2**31
"""Seeds are 0 to this, exclusive."""


def weights(x: float, y: float) -> np.ndarray:
    """float32 (3,): what of each noise a place has; x and y from -1 to 1, (0, 0) is the first noise alone."""
    radius = math.hypot(x, y)
    if radius == 0.0:
        return np.array([1.0, 0.0, 0.0], np.float32)
    angle = radius * math.pi / 2.0
    side = math.sin(angle) / radius
    return np.array([math.cos(angle), side * x, side * y], np.float32)


def noise_at(seed: int, x: float, y: float, shape: tuple[int, int, int]) -> np.ndarray:
    """float32 noise (C, h, w). Image i of `d2g sample --seed=SEED` lies at (0, 0), (1, 0), (0, 1) for i = 0, 1, 2."""
    return np.tensordot(weights(x, y), _corners(seed, shape), 1)


@functools.lru_cache(maxsize=64)
def _corners(seed: int, shape: tuple[int, int, int]) -> np.ndarray:
    return draw_noise(seed, 3, shape)


def picture(noise: np.ndarray) -> np.ndarray:
    """Noise (C, h, w) as uint8 (h, w, 3): the first three channels (of fewer, the first), every level equally often."""
    channels = noise[:3] if len(noise) >= 3 else noise[[0, 0, 0]]
    return np.round(ndtr(channels) * 255.0).astype(np.uint8).transpose(1, 2, 0)
