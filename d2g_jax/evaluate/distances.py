"""What two sets of features say of each other, beside the Frechet distance, which is `frechet`'s."""

from __future__ import annotations

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


def precision(generated: np.ndarray, real: np.ndarray, k: int) -> float:
    """Improved precision (arXiv 1904.06991, eq. 1 and 2) of features (N, D) and (M, D); recall with both exchanged.

    The share of generated features that lie in the ball of some real one, whose radius is the distance to its k-th
    nearest neighbour among the real ones. Raises `UserError` as `check_neighbours`.
    """
    return float(np.mean(_balls(generated, real, k)[0] > 0))


def density(generated: np.ndarray, real: np.ndarray, k: int) -> float:
    """arXiv 2002.09797, eq. 4: balls of real features that a generated one lies in, on average, over k."""
    return float(np.mean(_balls(generated, real, k)[0]) / k)


def coverage(generated: np.ndarray, real: np.ndarray, k: int) -> float:
    """The same, eq. 5: the share of real features in whose ball there is a generated one."""
    return float(np.mean(_balls(generated, real, k)[1]))


NEIGHBOURLY = {
    "precision": precision,
    "recall": lambda generated, real, k: precision(real, generated, k),
    "density": density,
    "coverage": coverage,
}
"""What is made of nearest neighbours, of (generated, real, k)."""


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


def _balls(points: np.ndarray, centres: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """In how many k-th-neighbour balls of `centres` each of `points` lies (N,), and whether each ball has one (M,)."""
    points, centres = points.astype(np.float64), centres.astype(np.float64)
    for features in (points, centres):
        check_neighbours(len(features), k)
    radii, counts, hit = _radii(centres, k), [], np.zeros(len(centres), bool)
    for first in range(0, len(points), _ROWS):
        inside = _squared_distances(points[first : first + _ROWS], centres) <= radii
        counts.append(inside.sum(1))
        hit |= inside.any(0)
    return np.concatenate(counts), hit


def _radii(points: np.ndarray, k: int) -> np.ndarray:
    """Squared distance (N,) of each point to its k-th neighbour, itself not counted."""
    parts = []
    for first in range(0, len(points), _ROWS):
        distances = _squared_distances(points[first : first + _ROWS], points)
        rows = np.arange(len(distances))
        distances[rows, first + rows] = -1.0  # itself, whatever the rounding: the 0th
        parts.append(np.partition(distances, k, axis=1)[:, k])
    return np.concatenate(parts)


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, M) of float64 (N, D) and (M, D)."""
    return np.maximum(np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2.0 * a @ b.T, 0.0)
