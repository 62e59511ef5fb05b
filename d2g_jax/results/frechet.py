"""The Frechet distance of two sets of features (Heusel et al. 2017, eq. 6), in float64 on the host."""

from __future__ import annotations

import dataclasses

import numpy as np

from d2g_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Mean float64 (D,) and covariance float64 (D, D)."""

    mean: np.ndarray
    covariance: np.ndarray


def fit(features: np.ndarray, *, source: str = "features") -> Gaussian:
    """Mean and unbiased covariance of features (N, D).

    Raises `UserError` that names `source` unless N > D (below that the covariance is singular and the distance is
    dominated by its bias) and every value is finite.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2:
        raise UserError(f"{source}: features have shape {features.shape}; a Frechet distance needs (samples, features)")
    samples, size = features.shape
    if samples <= size:
        raise UserError(f"{source}: {samples} samples of {size} features; a Frechet distance needs at least {size + 1}")
    if not np.isfinite(features).all():
        raise UserError(f"{source}: features hold NaN or infinity; check the images they were taken from")
    mean = features.mean(0)
    centred = features - mean
    return Gaussian(mean, centred.T @ centred / (samples - 1))


def gaussian_distance(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), never negative.

    The square root of AB in the usual formula has the trace of the symmetric one here, whose eigenvalues `eigh` finds
    without complex numbers.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(f"features of {a.mean.size} and of {b.mean.size} numbers; take both from the same network")
    root = _square_root(a.covariance)
    product = root @ b.covariance @ root
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2)
    cross = np.sqrt(np.maximum(eigenvalues, 0)).sum()
    shift = np.square(a.mean - b.mean).sum()
    return float(max(shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross, 0.0))


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The distance of features (N, D) and (M, D), in squared units of the features."""
    return gaussian_distance(fit(a), fit(b))


def _square_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
