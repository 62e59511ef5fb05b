"""Distortions of known strength, and the two-alternative forced choices (2AFC) that calibrate a perceptual metric.

A triplet is a reference and two distorted versions of it. `judgement` follows the LPIPS data set (Zhang et al. 2018):
the fraction that finds the *second* (`right`) closer to the reference, so 1.0 means right is closer, 0.0 left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import fft, ndimage

from d2g_jax.digits import data

Distortion = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]

SHARPNESS = 8.0
"""Of opinions across kinds: strengths 0.1 apart convince sigmoid(0.8) = 69% of the judges, 0.3 apart 92%."""

SMALLEST_GAP = 0.1
"""Two distortions of one kind differ by at least this, so that their order is not in doubt."""


class Triplets(NamedTuple):
    """Images float32 (N, 32, 32, 3) and judgements float32 (N,) in [0, 1].

    The reference is in [-1, 1]; `contrast` and `brightness` leave that range.
    """

    reference: np.ndarray
    left: np.ndarray
    right: np.ndarray
    judgement: np.ndarray


def blur(ink: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian blur; sigma in pixels."""
    return ndimage.gaussian_filter(ink, sigma)


def noise(ink: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """White noise, clipped to [0, 1]."""
    return np.clip(ink + deviation * rng.standard_normal(ink.shape), 0, 1)


def shift(ink: np.ndarray, pixels: float, rng: np.random.Generator) -> np.ndarray:
    """A translation by `pixels` in a random direction."""
    angle = rng.uniform(0, 2 * np.pi)
    return ndimage.shift(ink, (pixels * np.sin(angle), pixels * np.cos(angle)), order=1)


def rotate(ink: np.ndarray, degrees: float, rng: np.random.Generator) -> np.ndarray:
    """A rotation about the centre, to a random side."""
    return ndimage.rotate(ink, degrees * _sign(rng), reshape=False, order=1)


def restroke(ink: np.ndarray, pixels: float, rng: np.random.Generator) -> np.ndarray:
    """Strokes grown or (random) shrunk by `pixels` on each flank; fractions of a pixel are blends."""
    operation = ndimage.grey_dilation if rng.random() < 0.5 else ndimage.grey_erosion
    steps = np.floor(pixels).astype(int)
    for _ in range(steps):
        ink = operation(ink, footprint=_CROSS)
    return ink + (pixels - steps) * (operation(ink, footprint=_CROSS) - ink)


def contrast(ink: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Scales about mid-grey by 1 + amount or (random) 1 - amount / 2, which stays above 0 for every strength in use.

    Not clipped: a generator whose amplitude runs away leaves [0, 1], and the metric has to see that.
    """
    return 0.5 + (ink - 0.5) * (1 + amount if rng.random() < 0.5 else 1 - amount / 2)


def brightness(ink: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Adds `amount` with a random sign; not clipped, as for `contrast`."""
    return ink + amount * _sign(rng)


def cutout(ink: np.ndarray, side: float, rng: np.random.Generator) -> np.ndarray:
    """A square of paper with `side` pixels, centred on a random pixel of the stroke; its border is antialiased."""
    rows, columns = np.nonzero(ink > 0.5 * ink.max())
    chosen = rng.integers(len(rows))
    cover = []
    for length, centre in zip(ink.shape, (rows[chosen], columns[chosen]), strict=True):
        away = np.arange(length) - centre
        cover.append(np.clip(np.minimum(away + 0.5, side / 2) - np.maximum(away - 0.5, -side / 2), 0, 1))
    return ink * (1 - np.outer(*cover))


def warp(ink: np.ndarray, pixels: float, rng: np.random.Generator) -> np.ndarray:
    """An elastic warp: a smooth random displacement field (sigma 4) of root mean square `pixels` per axis."""
    field = ndimage.gaussian_filter(rng.standard_normal((2, *ink.shape)), (0, 4, 4))
    field *= pixels / np.sqrt(np.square(field).mean())
    return ndimage.map_coordinates(ink, np.indices(ink.shape) + field, order=1)


def quantise(ink: np.ndarray, step: float, rng: np.random.Generator) -> np.ndarray:
    """JPEG-like: the DCT of 8x8 blocks rounded to multiples of `step` (1 + (u + v) / 4), clipped to [0, 1]."""
    if step == 0:
        return ink
    rows, columns = ink.shape[0] // 8, ink.shape[1] // 8
    blocks = ink.reshape(rows, 8, columns, 8)
    table = step * (1 + np.add.outer(np.arange(8), np.arange(8)) / 4)[None, :, None, :]
    coefficients = np.round(fft.dctn(blocks, axes=(1, 3), norm="ortho") / table) * table
    return np.clip(fft.idctn(coefficients, axes=(1, 3), norm="ortho").reshape(ink.shape), 0, 1)


# Each kind with its amount at strength 1. The common scale is the change in the features of the shipped classifier:
# at strength 1 the mean distance to the undistorted image is that between two real images of the same digit, measured
# on 400 training images, and close to proportional below. Contrast is the exception: the classifier was trained to
# overlook some of it and reaches 0.6, and its amount is set by eye and by its root mean square change.
KINDS: tuple[tuple[Distortion, float], ...] = (
    (blur, 2.75),
    (noise, 0.6),
    (shift, 3.0),
    (rotate, 28.0),
    (restroke, 2.0),
    (contrast, 1.0),
    (brightness, 0.42),
    (cutout, 8.0),
    (warp, 2.2),
    (quantise, 2.75),
)


def distort(ink: np.ndarray, kind: int, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Ink (H, W) in [0, 1] distorted by `KINDS[kind]` with `strength` in [0, 1]; strength 0 changes nothing."""
    function, amount = KINDS[kind]
    return function(ink, amount * strength, rng)


def triplets(images: np.ndarray, seed: int, n: int) -> Triplets:
    """`n` triplets whose references are drawn from `images` (any form that `data.to_ink` takes).

    Half compare two strengths of one kind, where the weaker is closer without question. Half compare two kinds on
    the common scale, where opinions divide as sigmoid(SHARPNESS * difference in strength).
    """
    rng = np.random.default_rng(seed)
    ink = data.to_ink(images)
    chosen = rng.integers(len(ink), size=n)
    left, right = np.empty((2, n, *ink.shape[1:]))
    judgement = np.empty(n, np.float32)
    for row, index in enumerate(chosen):
        kinds, strengths, judgement[row] = _question(rng)
        left[row] = distort(ink[index], kinds[0], strengths[0], rng)
        right[row] = distort(ink[index], kinds[1], strengths[1], rng)
    return Triplets(*(data.to_images(batch) for batch in (ink[chosen], left, right)), judgement)


_CROSS = ndimage.generate_binary_structure(2, 1)


def _sign(rng: np.random.Generator) -> int:
    return 1 if rng.random() < 0.5 else -1


def _question(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """Two kinds, two strengths, and the judgement on them."""
    if rng.random() < 0.5:
        weak = rng.uniform(0, 1 - SMALLEST_GAP)
        strengths = rng.permutation([weak, rng.uniform(weak + SMALLEST_GAP, 1)])
        return np.repeat(rng.integers(len(KINDS)), 2), strengths, float(strengths[0] > strengths[1])
    strengths = rng.uniform(0, 1, size=2)
    return (
        rng.permutation(len(KINDS))[:2],
        strengths,
        float(1 / (1 + np.exp(-SHARPNESS * (strengths[0] - strengths[1])))),
    )
