"""Two-tone textures whose phase, direction and period hold across the whole picture.

What one network call cannot do is agreement over a distance (docs/when.md): so nothing of a texture is local. A caption
names its kind and its two colours; noise decides direction, period and phase.
"""

from __future__ import annotations

import functools

import numpy as np

KINDS = ("stripes", "checks", "dots", "bricks", "zigzags", "triangles")

PERIOD = (11.0, 17.0)
"""Pixels, the limits of what is drawn from."""

_FINE = 2
"""Points a pixel's side is sampled at: edges are antialiased."""


def texture(kind: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """A texture of `KINDS[kind]`: float32 (size, size), the share of the light colour in [0, 1]."""
    angle, period = rng.uniform(0, 2 * np.pi), rng.uniform(*PERIOD)
    x0, y0 = rng.uniform(0, 4 * size, 2)
    x, y = _points(size)
    u = (x - x0) * np.cos(angle) + (y - y0) * np.sin(angle)
    v = (y - y0) * np.cos(angle) - (x - x0) * np.sin(angle)
    light = _LIGHT[KINDS[kind]](u / period, v / period)
    return light.reshape(size, _FINE, size, _FINE).mean(axis=(1, 3), dtype=np.float32)


@functools.cache
def _points(size: int) -> tuple[np.ndarray, np.ndarray]:
    side = (np.arange(size * _FINE) + 0.5) / _FINE
    return side[None, :], side[:, None]


def _on(t: np.ndarray) -> np.ndarray:
    """The first half of each unit of `t`."""
    return t - np.floor(t) < 0.5


def _waves(u: np.ndarray, v: np.ndarray, first: float) -> list[np.ndarray]:
    """Coordinates along three directions 60 degrees apart, the first at `first`."""
    return [u * np.cos(a) + v * np.sin(a) for a in first + np.pi / 3 * np.arange(3)]


def _dots(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return sum(np.cos(2 * np.pi * w / 1.1) for w in _waves(u, v, 0.0)) > -0.2


def _triangles(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Equal triangles with edges on three families of lines, dark and light in turn."""
    a, b, c = (_on(w / 1.6) for w in _waves(u, v, np.pi / 6))
    return a ^ b ^ c


_LIGHT = {
    "stripes": lambda u, v: _on(u),
    "checks": lambda u, v: _on(u / 1.3) == _on(v / 1.3),
    "dots": _dots,
    "bricks": lambda u, v: _on(u / 1.5 + np.floor(v / 0.75) % 4 / 4),
    "zigzags": lambda u, v: _on(u + 0.8 * np.abs(v / 1.6 % 1 * 2 - 1)),
    "triangles": _triangles,
}
"""By kind: where it is light, of coordinates in periods. About half of the picture is."""
