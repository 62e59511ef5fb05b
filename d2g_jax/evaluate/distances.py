"""What two sets of features say of each other, beside the Frechet distance, which is `frechet`'s."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from d2g_jax.runtime.errors import UserError

_ROWS = 1024  # of a block of distances: 1024 x 40,000 in float64 are 328 MB


def kernel_distance(a: np.ndarray, b: np.ndarray, *, subsets: int, size: int, seed: int) -> tuple[float, float]:
    """KID (arXiv 1801.01401): mean over random subsets of the unbiased squared MMD, and its standard deviation.

    The kernel is (x . y / D + 1)^3; each subset takes `size` features of `a` and of `b` without replacement.

    Args:
      a, b: (N, D) and (M, D).
      subsets, size: how many subsets, and of how many features.
      seed: of numpy's RandomState, whose stream is frozen.

    Raises:
      UserError: as `check_subsets`.
    """
    check_subsets(len(a), len(b), size)
    rng, values = np.random.RandomState(seed), []
    for _ in range(subsets):
        x = a[rng.choice(len(a), size, replace=False)].astype(np.float64)
        y = b[rng.choice(len(b), size, replace=False)].astype(np.float64)
        values.append(_squared_mmd(x, y))
    return float(np.mean(values)), float(np.std(values))


def check_subsets(a: int, b: int, size: int) -> None:
    """Raises `UserError` for fewer features, `a` and `b`, than a subset takes, and for a subset without a pair."""
    if size < 2:
        raise UserError(f"KID: subsets of {size}; its estimate is of pairs, so give at least 2 images")
    if min(a, b) < size:
        raise UserError(f"KID: subsets of {size} need as many images; there are {a} and {b}")


def _squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased estimate for as many x as y, (m, D) each."""
    m, dim = x.shape
    kernel = lambda u, v: (u @ v.T / dim + 1.0) ** 3  # noqa: E731  (m, m)
    within = kernel(x, x) + kernel(y, y)
    return float((within.sum() - np.trace(within)) / (m * (m - 1)) - 2.0 * kernel(x, y).mean())


NEIGHBOURLY = ("precision", "recall", "density", "coverage")
"""What `neighbourly` finds."""


def neighbourly(generated: np.ndarray, real: np.ndarray, ks: Sequence[int]) -> dict[int, dict[str, float]]:
    """`NEIGHBOURLY` of features (N, D) and (M, D) for each k, in one pass.

    The ball of a feature reaches to its k-th nearest neighbour on its own side. Precision (arXiv 1904.06991, eq. 1 and
    2) is the share of generated features in the ball of some real one, recall the same with both exchanged. Density
    (arXiv 2002.09797, eq. 4) is how many real balls a generated feature lies in on average, over k; coverage (eq. 5)
    the share of real balls with a generated one: both without the balls' edges, as their authors' code has it, so that
    equal sets have a density of 1. Raises `UserError` as `check_neighbours`.
    """
    generated, real = generated.astype(np.float64), real.astype(np.float64)
    for features in (generated, real):
        check_neighbours(len(features), max(ks))
    own, others = _radii(generated, ks), _radii(real, ks)
    precise, balls = np.zeros((2, len(ks), len(generated)))
    recalled, covered = np.zeros((2, len(ks), len(real)), bool)
    for first in range(0, len(generated), _ROWS):
        rows = slice(first, first + _ROWS)
        distances = _squared_distances(generated[rows], real)
        for i in range(len(ks)):
            precise[i, rows] = (distances <= others[i]).any(1)
            recalled[i] |= (distances <= own[i, rows, None]).any(0)
            inside = distances < others[i]
            balls[i, rows] = inside.sum(1)
            covered[i] |= inside.any(0)
    means = np.array([precise.mean(1), recalled.mean(1), balls.mean(1) / ks, covered.mean(1)])
    return {k: dict(zip(NEIGHBOURLY, values.tolist(), strict=True)) for k, values in zip(ks, means.T, strict=True)}


def clip_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """CMMD (arXiv 2401.09603) of unit features (N, D) and (M, D): 1000 times the squared MMD, each of itself included.

    The kernel is exp(-|x - y|^2 / (2 10^2)). Zero for equal sets.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)

    def mean(x: np.ndarray, y: np.ndarray) -> float:
        parts = (np.exp(-_squared_distances(x[i : i + _ROWS], y) / 200.0).sum() for i in range(0, len(x), _ROWS))
        return sum(parts) / (len(x) * len(y))

    return float(1000.0 * (mean(a, a) + mean(b, b) - 2.0 * mean(a, b)))


def check_neighbours(count: int, k: int) -> None:
    """Raises `UserError` for k features or fewer."""
    if count <= k:
        raise UserError(
            f"{count} images have no {k}-th neighbour, which precision, recall, density and coverage need; give more"
        )


def _radii(points: np.ndarray, ks: Sequence[int]) -> np.ndarray:
    """Squared distance (K, N) of each point to its k-th neighbour for each k, itself not counted."""
    parts = []
    for first in range(0, len(points), _ROWS):
        distances = _squared_distances(points[first : first + _ROWS], points)
        rows = np.arange(len(distances))
        distances[rows, first + rows] = -1.0  # itself, whatever the rounding: the 0th
        parts.append(np.partition(distances, ks, axis=1)[:, ks])
    return np.concatenate(parts).T


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, M) of float64 (N, D) and (M, D)."""
    return np.maximum(np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2.0 * a @ b.T, 0.0)
