"""Figures of the demo: Frechet distances in the classifier's features, prompt accuracy, and their bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from d2g_jax.digits import captions, classifier, data, scores
from d2g_jax.results.frechet import frechet_distance
from d2g_jax.results.unexplained import unexplained

REAL = "real test images"
FLOOR_ROUNDS = 5


def real_against_real(features: np.ndarray, labels: np.ndarray) -> float:
    """Mean distance of two disjoint halves of the real images with equal shares of each digit, over a few splits."""
    distances = []
    for seed in range(FLOOR_ROUNDS):
        rng = np.random.default_rng(seed)
        halves: tuple[list[int], list[int]] = ([], [])
        for digit in range(10):
            rows = rng.permutation(np.flatnonzero(labels == digit))
            halves[0].extend(rows[: len(rows) // 2])
            halves[1].extend(rows[len(rows) // 2 : len(rows) // 2 * 2])
        distances.append(frechet_distance(features[halves[0]], features[halves[1]]))
    return float(np.mean(distances))


def score(
    images: Mapping[str, np.ndarray],
    more_teacher_images: np.ndarray,
    prompts: Sequence[captions.Prompt],
    calls: Mapping[str, int],
    latents: Mapping[str, np.ndarray],
    *,
    teacher: str,
) -> dict[str, Any]:
    """`result.json` without timings.

    Args:
      images: uint8 (N, 32, 32, 3) by system, all for the same `prompts` and noise; one of them is `teacher`.
      more_teacher_images: the teacher's on other noise and prompts, for the floor.
      calls: network calls per image by system.
      latents: scaled, (N, C, h, w), by system: of them the standard deviation and R (`results.unexplained`).
    """
    judge = classifier.load_classifier()
    train, test = data.load()
    real, real_labels = np.concatenate([train.images, test.images]), np.concatenate([train.labels, test.labels])
    real_features, _ = classifier.features(judge, real)
    teacher_features, _ = classifier.features(judge, images[teacher])
    asked = [np.array([getattr(p, name) for p in prompts]) for name in ("digit", "weight", "slant")]

    measured = data.attributes(test.images, test.labels)
    test_features, _ = classifier.features(judge, test.images)
    systems: dict[str, Any] = {
        REAL: {
            "samples": len(test.images),
            "frechet_to_teacher": frechet_distance(test_features, teacher_features),
            "accuracy": scores.prompt_accuracy(test.images, test.labels, measured.weight, measured.slant, judge),
        }
    }
    for name, drawn in images.items():
        features, _ = classifier.features(judge, drawn)
        systems[name] = {
            "samples": len(drawn),
            "frechet_to_teacher": None if name == teacher else frechet_distance(features, teacher_features),
            "frechet_to_real": frechet_distance(features, real_features),
            "accuracy": scores.prompt_accuracy(drawn, *asked, judge),
            "network_calls": calls[name],
            "latent_std": float(np.std(latents[name])),
            "unexplained": None if name == teacher else unexplained(latents[name], latents[teacher]),
        }
    floors = {
        "teacher_vs_teacher": frechet_distance(classifier.features(judge, more_teacher_images)[0], teacher_features),
        "real_vs_real": real_against_real(real_features, real_labels),
    }
    return {
        "protocol": {
            "frechet": "features (64) of the independent digit classifier, 32x32 images as uint8",
            "accuracy": "digit by the classifier; weight and slant measured from the pixels of the image",
        },
        "systems": {name: _rounded(values) for name, values in systems.items()},
        "floors": _rounded(floors),
        "checks": checks(systems, floors, teacher),
    }


def checks(systems: Mapping[str, Any], floors: Mapping[str, float], teacher: str) -> list[dict[str, Any]]:
    """The bars, each with the value it is held against."""
    by_kind = {kind: next(s for name, s in systems.items() if name.startswith(kind)) for kind in ("MSE", "E-L", "full")}
    teacher_accuracy = systems[teacher]["accuracy"]
    rows = [
        (f"teacher: accuracy of {name} at least 0.95", teacher_accuracy[name], 0.95, True)
        for name in ("digit", "weight", "slant")
    ]
    rows += [
        (
            "teacher: Frechet distance to real over real against real, at most 3",
            systems[teacher]["frechet_to_real"] / floors["real_vs_real"],
            3.0,
            False,
        ),
        (
            "E-LatentLPIPS student: Frechet distance over the MSE student's, at most 1/3",
            by_kind["E-L"]["frechet_to_teacher"] / by_kind["MSE"]["frechet_to_teacher"],
            1 / 3,
            False,
        ),
        (
            "full student: Frechet distance over the E-LatentLPIPS student's, at most 1",
            by_kind["full"]["frechet_to_teacher"] / by_kind["E-L"]["frechet_to_teacher"],
            1.0,
            False,
        ),
        (
            "full student: accuracy of all three together over the teacher's, at least 0.95",
            by_kind["full"]["accuracy"]["all"] / teacher_accuracy["all"],
            0.95,
            True,
        ),
    ]
    return [
        {
            "name": name,
            "value": round(float(value), 4),
            "bar": round(bar, 4),
            "met": bool(value >= bar if up else value <= bar),
        }
        for name, value, bar, up in rows
    ]


def table(result: Mapping[str, Any]) -> str:
    """The systems as lines of text."""
    parts = ("digit", "weight", "slant", "all")
    heads = " ".join(f"{part:>6}" for part in parts)
    lines = [f"{'':32} {'to teacher':>11} {'to real':>8} {'R':>6}   accuracy: {heads}"]
    for name, values in result["systems"].items():
        numbers = [values.get("frechet_to_teacher"), values.get("frechet_to_real")]
        distances = " ".join(
            f"{'-' if x is None else format(x, '.2f'):>{width}}" for x, width in zip(numbers, (11, 8), strict=True)
        )
        accuracy = " ".join(f"{values['accuracy'][key]:6.3f}" for key in parts)
        r = values.get("unexplained")
        lines.append(f"{name:32} {distances} {'-' if r is None else format(r, '.3f'):>6}             {accuracy}")
    lines.append("floors: " + ", ".join(f"{name} {value:.2f}" for name, value in result["floors"].items()))
    lines += [
        f"{'met   ' if check['met'] else 'MISSED'} {check['name']}: {check['value']}" for check in result["checks"]
    ]
    return "\n".join(lines)


def _rounded(values: Any) -> Any:
    """Six significant digits: what a float64 figure is good for, and no more than a reader can compare."""
    if isinstance(values, dict):
        return {name: _rounded(value) for name, value in values.items()}
    return float(f"{values:.6g}") if isinstance(values, float) else values
