"""Distortions of known strength, and the two-alternative forced choices (2AFC) that calibrate a perceptual metric.

A triplet is a reference and two distorted versions of it. `judgement` follows the LPIPS data set (Zhang et al. 2018):
the fraction that finds the *second* (`right`) closer to the reference, so 1.0 means right is closer, 0.0 left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import fft, ndimage

from d2g_jax.digits.scenes import PARTS, SIZE, Scene, draw, glyphs, random_place

Distortion = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
"""(image float64 (H, W, 3) in [0, 1], amount, generator) -> another; what leaves [0, 1] is not clipped."""

SHARPNESS = 8.0
"""Of opinions across kinds: strengths 0.1 apart convince sigmoid(0.8) = 69% of the judges, 0.3 apart 92%."""

SMALLEST_GAP = 0.1
"""Two distortions of one kind differ by at least this, so that their order is not in doubt."""

TEXTURE_QUESTIONS = 0.2
"""Share of the questions that ask for a sharp texture of the right kind with another phase, or a flattened one."""

FOR_THE_SHARP = 0.95
"""Share of the judges who find the sharp one closer."""


class Triplets(NamedTuple):
    """Images float32 (N, 64, 64, 3), the reference in [-1, 1], and judgements float32 (N,) in [0, 1]."""

    reference: np.ndarray
    left: np.ndarray
    right: np.ndarray
    judgement: np.ndarray


def blur(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian blur; sigma in pixels."""
    return ndimage.gaussian_filter(image, (sigma, sigma, 0))


def noise(image: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """White noise."""
    return image + deviation * rng.standard_normal(image.shape)


def shift(image: np.ndarray, pixels: float, rng: np.random.Generator) -> np.ndarray:
    """A translation by `pixels` in a random direction."""
    angle = rng.uniform(0, 2 * np.pi)
    return ndimage.shift(image, (pixels * np.sin(angle), pixels * np.cos(angle), 0), order=1, mode="reflect")


def rotate(image: np.ndarray, degrees: float, rng: np.random.Generator) -> np.ndarray:
    """A rotation about the centre, to a random side."""
    return ndimage.rotate(image, degrees * _sign(rng), reshape=False, order=1, mode="reflect")


def contrast(image: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Scales about the mean colour by 1 + amount or (random) 1 - amount.

    A generator whose amplitude runs away leaves [0, 1], and the metric has to see that.
    """
    mean = image.mean((0, 1))
    return mean + (image - mean) * (1 + amount * _sign(rng))


def brightness(image: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Adds `amount` with a random sign."""
    return image + amount * _sign(rng)


def tint(image: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Adds a random colour of that length, of no brightness."""
    colour = rng.standard_normal(3)
    colour -= colour.mean()
    return image + amount * colour / np.linalg.norm(colour)


def cutout(image: np.ndarray, side: float, rng: np.random.Generator) -> np.ndarray:
    """A square of the mean colour with `side` pixels at a random place; its border is antialiased."""
    cover = []
    for length in image.shape[:2]:
        away = np.arange(length) - rng.uniform(0, length)
        cover.append(np.clip(np.minimum(away + 0.5, side / 2) - np.maximum(away - 0.5, -side / 2), 0, 1))
    hidden = np.outer(*cover)[..., None]
    return image * (1 - hidden) + image.mean((0, 1)) * hidden


def warp(image: np.ndarray, pixels: float, rng: np.random.Generator) -> np.ndarray:
    """An elastic warp: a smooth random displacement field (sigma 6) of root mean square `pixels` per axis."""
    field = ndimage.gaussian_filter(rng.standard_normal((2, *image.shape[:2])), (0, 6, 6))
    at = np.indices(image.shape[:2]) + field * pixels / np.sqrt(np.square(field).mean())
    return np.stack([ndimage.map_coordinates(c, at, order=1, mode="reflect") for c in np.moveaxis(image, 2, 0)], -1)


def quantise(image: np.ndarray, step: float, rng: np.random.Generator) -> np.ndarray:
    """JPEG-like: the DCT of 8x8 blocks of each channel rounded to multiples of `step` (1 + (u + v) / 4)."""
    if step == 0:
        return image
    height, width = image.shape[:2]
    blocks = image.reshape(height // 8, 8, width // 8, 8, 3)
    table = step * (1 + np.add.outer(np.arange(8), np.arange(8)) / 4)[None, :, None, :, None]
    coefficients = np.round(fft.dctn(blocks, axes=(1, 3), norm="ortho") / table) * table
    return fft.idctn(coefficients, axes=(1, 3), norm="ortho").reshape(image.shape)


def flatten(image: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Moves each pixel `share` of the way to the mean colour around it (sigma 10): texture fades, its mean stays."""
    return image + share * (ndimage.gaussian_filter(image, (10, 10, 0)) - image)


KINDS: tuple[tuple[Distortion, float], ...] = (
    (blur, 3.0),
    (noise, 0.5),
    (shift, 4.0),
    (rotate, 20.0),
    (contrast, 0.8),
    (brightness, 0.4),
    (tint, 0.5),
    (cutout, 26.0),
    (warp, 2.5),
    (quantise, 2.0),
    (flatten, 1.0),
)
"""Each kind with its amount at strength 1."""


def distort(image: np.ndarray, kind: int, strength: float, rng: np.random.Generator) -> np.ndarray:
    """An image (H, W, 3) in [0, 1] distorted by `KINDS[kind]` with `strength` in [0, 1]; strength 0 changes nothing."""
    function, amount = KINDS[kind]
    return function(image, amount * strength, rng)


def triplets(count: int, seed: int, *, test: bool = False) -> Triplets:
    """`count` triplets of random scenes, of digits held out if `test`.

    Two in five compare two strengths of one kind, where the weaker is closer without question. As many compare two
    kinds, where opinions divide as sigmoid(SHARPNESS * difference in strength). The others are `texture_question`s.
    """
    images, judgement = np.empty((3, count, SIZE, SIZE, 3), np.float32), np.empty(count, np.float32)
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        ask = texture_question if rng.random() < TEXTURE_QUESTIONS else _strength_question
        *asked, judgement[i] = ask(rng, test)
        images[:, i] = np.stack(asked) * 2 - 1
    return Triplets(*images, judgement)


def texture_question(rng: np.random.Generator, test: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Reference, left, right (64, 64, 3) in [0, 1] and the judgement on them.

    One is the same scene with another texture of the same kind: sharp, and nowhere the same. The other is the reference
    blurred or flattened until its texture is all but gone: the right mean everywhere, and nothing else.
    """
    reference, other = _scene(rng, test, 2)
    gone = (
        blur(reference, rng.uniform(4, 8), rng) if rng.random() < 0.5 else flatten(reference, rng.uniform(0.8, 1), rng)
    )
    if rng.random() < 0.5:
        return reference, other, gone, 1 - FOR_THE_SHARP
    return reference, gone, other, FOR_THE_SHARP


def _scene(rng: np.random.Generator, test: bool, textures: int = 1) -> list[np.ndarray]:
    """A random scene with as many different textures of one kind, each (64, 64, 3) in [0, 1]."""
    source = glyphs(test)
    row, place = rng.integers(len(source.ink)), random_place(rng)
    chosen = rng.integers([PARTS[name] for name in ("ink", "texture", "dark", "light")])
    scene = Scene(*map(int, (*source.labels[row], *chosen)))
    return [draw(scene, source.ink[row], place, rng) / 255 for _ in range(textures)]


def _strength_question(rng: np.random.Generator, test: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    (reference,) = _scene(rng, test)
    if rng.random() < 0.5:
        weak = rng.uniform(0, 1 - SMALLEST_GAP)
        strengths = rng.permutation([weak, rng.uniform(weak + SMALLEST_GAP, 1)])
        kinds, judgement = np.repeat(rng.integers(len(KINDS)), 2), float(strengths[0] > strengths[1])
    else:
        strengths, kinds = rng.uniform(0, 1, size=2), rng.permutation(len(KINDS))[:2]
        judgement = float(1 / (1 + np.exp(-SHARPNESS * (strengths[0] - strengths[1]))))
    left, right = (distort(reference, k, s, rng) for k, s in zip(kinds, strengths, strict=True))
    return reference, left, right, judgement


def _sign(rng: np.random.Generator) -> int:
    return 1 if rng.random() < 0.5 else -1
