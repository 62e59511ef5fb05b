"""What samples are judged by: is it the digit, the weight and the slant asked for, and how far from the real ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from d2g_jax.digits import data
from d2g_jax.digits.classifier import features
from d2g_jax.models.network import Params
from d2g_jax.results import frechet


def prompt_accuracy(
    images: np.ndarray,
    digit: Sequence[int],
    weight: Sequence[int],
    slant: Sequence[int],
    classifier: Params,
) -> dict[str, float]:
    """Fractions of images whose digit, weight, slant, and all three together, are as asked.

    Args:
      images: (N, 32, 32, 3) uint8 or float in [-1, 1], or whatever else `data.to_ink` takes.
      digit, weight, slant: (N,) labels asked for; weight and slant are indices into `data.WEIGHTS`, `data.SLANTS`
        and are measured by the plain thresholds of the digit asked for.
      classifier: parameters from `load_classifier`.

    Returns:
      {"digit": f, "weight": f, "slant": f, "all": f}.
    """
    if not len(images) == len(digit) == len(weight) == len(slant):
        raise ValueError(f"{len(images)} images, {len(digit)}, {len(weight)} and {len(slant)} labels")
    _, logits = features(classifier, images)
    measured = data.attributes(images, np.asarray(digit))
    right = {
        "digit": logits.argmax(1) == np.asarray(digit),
        "weight": measured.weight == np.asarray(weight),
        "slant": measured.slant == np.asarray(slant),
    }
    right["all"] = right["digit"] & right["weight"] & right["slant"]
    return {name: float(hit.mean()) for name, hit in right.items()}


def distance_to(images: np.ndarray, reference: np.ndarray, classifier: Params) -> float:
    """Frechet distance of images to reference features (M, 64), as `features` of the same classifier gave them."""
    return frechet.frechet_distance(features(classifier, images)[0], reference)
