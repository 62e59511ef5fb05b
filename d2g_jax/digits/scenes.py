"""Scenes: a real handwritten digit in colour in front of a texture, 64x64, and the labels that captions are made of."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from d2g_jax.digits import data
from d2g_jax.digits.data import UNCLEAR
from d2g_jax.digits.textures import KINDS, texture

REAL = 2000
"""Scenes that samples are compared with."""
SIZE = 64
GLYPH = 50
"""Pixels of a digit's side, a border of two included."""

INKS = {"red": (0.88, 0.10, 0.10), "green": (0.08, 0.62, 0.15), "purple": (0.70, 0.15, 0.85)}
DARKS = {"black": (0.05, 0.05, 0.05), "navy": (0.05, 0.08, 0.40), "brown": (0.33, 0.15, 0.04)}
LIGHTS = {"white": (0.97, 0.97, 0.97), "yellow": (0.98, 0.90, 0.30), "sky": (0.55, 0.87, 0.98)}

PARTS = {
    "digit": 10,
    "weight": len(data.WEIGHTS),
    "slant": len(data.SLANTS),
    "ink": len(INKS),
    "texture": len(KINDS),
    "dark": len(DARKS),
    "light": len(LIGHTS),
}
"""What a caption names, with how many there are of each; the order of `Scenes.labels`."""

TEXTURE = list(PARTS).index("texture")
"""Followed by dark and light."""


class Scene(NamedTuple):
    """The labels of one scene, in the order of `PARTS`."""

    digit: int
    weight: int
    slant: int
    ink: int
    texture: int
    dark: int
    light: int


@dataclasses.dataclass(frozen=True)
class Scenes:
    """Images uint8 (N, 64, 64, 3) and labels int64 (N, 7) in the order of `PARTS`."""

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Glyphs:
    """Ink float32 (N, GLYPH, GLYPH) in [0, 1], and labels int64 (N, 3): digit, weight, slant."""

    ink: np.ndarray
    labels: np.ndarray


@functools.cache
def glyphs(test: bool = False) -> Glyphs:
    """The 1,437 digits that scenes for training show, or the 360 others."""
    train, held_out = data.load()
    digits = held_out if test else train
    # A stroke with edges, as the textures have.
    ink = np.clip(2.2 * data.enlarge(digits.ink, GLYPH) - 0.5, 0, 1).astype(np.float32)
    return Glyphs(ink, np.stack([digits.labels, *data.attributes(digits)], axis=1).astype(np.int64))


def render(count: int, seed: int, *, test: bool = False, plain: bool = False) -> Scenes:
    """`count` random scenes; the first ones of a seed are the same for every count.

    Args:
      test: of digits held out.
      plain: grounds of one colour, dark or light. Nothing but the digit is there to be drawn, and so a teacher learns
        from them what in front of textures it would learn many times more slowly.
    """
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    labels = np.empty((count, len(PARTS)), np.int64)
    source = glyphs(test)
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        row = rng.integers(len(source.ink))
        labels[i, :3] = source.labels[row]
        labels[i, 3:] = rng.integers([PARTS[name] for name in ("ink", "texture", "dark", "light")])
        if plain:
            labels[i, [TEXTURE, TEXTURE + 1 + rng.integers(2)]] = UNCLEAR
        images[i] = draw(Scene(*labels[i]), source.ink[row], random_place(rng), rng)
    return Scenes(images, labels)


def real_scenes(*, test: bool = False) -> Scenes:
    """Those that samples are compared with, or as many of digits held out."""
    return render(REAL, 5 if test else 4, test=test)


def random_place(rng: np.random.Generator) -> tuple[int, int]:
    """Top and left of a digit, near the middle."""
    top, left = rng.integers(4, SIZE - GLYPH - 3, 2)
    return int(top), int(left)


def draw(scene: Scene, ink: np.ndarray, place: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """uint8 (64, 64, 3): `ink` (GLYPH, GLYPH) at `place` in front of a random texture of the scene's kind.

    Without a kind the ground has the one colour that the scene names.
    """
    if scene.texture == UNCLEAR:
        share = np.full((SIZE, SIZE, 1), scene.dark == UNCLEAR, np.float32)
    else:
        share = texture(scene.texture, SIZE, rng)[..., None]
    picture = share * _colour(LIGHTS, scene.light) + (1 - share) * _colour(DARKS, scene.dark)
    top, left = place
    cover = np.zeros((SIZE, SIZE, 1))
    cover[top : top + GLYPH, left : left + GLYPH, 0] = ink
    picture = cover * _colour(INKS, scene.ink) + (1 - cover) * picture
    return np.round(255 * picture).astype(np.uint8)


def _colour(colours: dict[str, tuple[float, float, float]], index: int) -> np.ndarray:
    return np.asarray(list(colours.values())[index])  # a colour that is not named has no share
