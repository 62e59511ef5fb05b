"""What two sets of features say of each other: KID, precision and recall. The Frechet distance is `frechet`'s."""

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


def precision_recall(generated: np.ndarray, real: np.ndarray, k: int) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991, eq. 1 and 2) of features (N, D) and (M, D).

    Precision is the share of generated features that lie in the ball of some real one, whose radius is the distance to
    its k-th nearest neighbour among the real ones; recall the same with both exchanged.
    Raises `UserError` as `check_neighbours`.
    """
    generated, real = generated.astype(np.float64), real.astype(np.float64)
    for features in (generated, real):
        check_neighbours(len(features), k)
    return _covered(generated, real, k), _covered(real, generated, k)


def check_neighbours(count: int, k: int) -> None:
    """Raises `UserError` for k features or fewer."""
    if count <= k:
        raise UserError(f"precision and recall: {count} images have no {k}-th neighbour; give more")


def _covered(points: np.ndarray, centres: np.ndarray, k: int) -> float:
    """The share of `points` inside the k-th-neighbour ball of at least one of `centres`."""
    radii = _radii(centres, k)
    hits = [
        (_squared_distances(points[i : i + _ROWS], centres) <= radii).any(1).sum() for i in range(0, len(points), _ROWS)
    ]
    return float(sum(hits) / len(points))


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
