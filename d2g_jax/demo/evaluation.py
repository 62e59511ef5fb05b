"""Figures of the demo: Frechet distances in the judge's features, prompt accuracy, and their bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from d2g_jax.demo.judge import PROTOCOL, accuracy
from d2g_jax.digits import captions, scenes
from d2g_jax.digits.judge import judge
from d2g_jax.digits.scores import prompt_accuracy, sharp_energy
from d2g_jax.models.network import Params
from d2g_jax.results.frechet import frechet_distance
from d2g_jax.results.unexplained import unexplained

REAL = "real test images"
FLOOR_ROUNDS = 5

Bar = tuple[str, float, float, bool]
"""What is asked, the value found, the bar, and whether more is better."""


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
    params: Params,
    images: Mapping[str, np.ndarray],
    more_teacher_images: np.ndarray,
    prompts: Sequence[captions.Prompt],
    calls: Mapping[str, int],
    latents: Mapping[str, np.ndarray],
    kinds: Mapping[str, str],
) -> dict[str, Any]:
    """`result.json` without timings.

    Args:
      params: of the judge.
      images: uint8 (N, H, W, 3) by system, all for the same `prompts` and noise.
      more_teacher_images: the teacher's on other noise and prompts, for the floor.
      calls: network calls per image by system.
      latents: scaled, (N, C, h, w), by system: of them the standard deviation and R (`results.unexplained`).
      kinds: the names of systems under teacher, mse, e_latent_lpips and full.
    """
    teacher = kinds["teacher"]
    real, test = scenes.real_scenes(), scenes.real_scenes(test=True)
    real_features, _ = judge(params, real.images)
    looks = {name: judge(params, drawn) for name, drawn in images.items()}
    teacher_features, sharp = looks[teacher][0], sharp_energy(images[teacher])
    test_features, seen = judge(params, test.images)
    systems: dict[str, Any] = {
        REAL: {
            "samples": len(test.images),
            "frechet_to_teacher": frechet_distance(test_features, teacher_features),
            "accuracy": prompt_accuracy(seen, test.labels),
            "sharpness": sharp_energy(test.images) / sharp,
        }
    }
    for name, drawn in images.items():
        features, seen = looks[name]
        systems[name] = {
            "samples": len(drawn),
            "frechet_to_teacher": None if name == teacher else frechet_distance(features, teacher_features),
            "frechet_to_real": frechet_distance(features, real_features),
            "accuracy": accuracy(seen, prompts),
            "network_calls": calls[name],
            "latent_std": float(np.std(latents[name])),
            "sharpness": sharp_energy(drawn) / sharp,
            "unexplained": None if name == teacher else unexplained(latents[name], latents[teacher]),
        }
    floors = {
        "teacher_vs_teacher": frechet_distance(judge(params, more_teacher_images)[0], teacher_features),
        "real_vs_real": real_against_real(real_features, real.labels[:, 0]),
    }
    return {
        "protocol": {**PROTOCOL, "sharpness": "energy above half the Nyquist frequency over the teacher's"},
        "systems": {name: _rounded(values) for name, values in systems.items()},
        "floors": _rounded(floors),
        "checks": checks(bars(systems, kinds)),
    }


def bars(systems: Mapping[str, Any], kinds: Mapping[str, str]) -> list[Bar]:
    """Set beforehand. `kinds`: the names of systems under teacher, mse, e_latent_lpips and full."""
    teacher, mse, perceptual, full = (systems[kinds[k]] for k in ("teacher", "mse", "e_latent_lpips", "full"))
    far = "frechet_to_teacher"
    return [
        *((f"teacher: accuracy of {p} at least 0.9", teacher["accuracy"][p], 0.9, True) for p in scenes.PARTS),
        ("MSE student: R at least 0.3", mse["unexplained"], 0.3, True),
        (
            "E-LatentLPIPS student: Frechet distance over the MSE student's, at most 1/2",
            perceptual[far] / mse[far],
            0.5,
            False,
        ),
        (
            "full student: Frechet distance over the E-LatentLPIPS student's, at most 1",
            full[far] / perceptual[far],
            1.0,
            False,
        ),
        ("MSE student: sharpness below 0.7", mse["sharpness"], 0.7, False),
        ("full student: sharpness at least 0.85", full["sharpness"], 0.85, True),
        ("full student: sharpness at most 1.15", full["sharpness"], 1.15, False),
        (
            "full student: accuracy of all parts together over the teacher's, at least 0.95",
            full["accuracy"]["all"] / max(teacher["accuracy"]["all"], 1e-9),  # of a teacher that is never right
            0.95,
            True,
        ),
    ]


def checks(held: Sequence[Bar]) -> list[dict[str, Any]]:
    """The bars, each with the value it is held against and whether it is met."""
    return [
        {
            "name": name,
            "value": round(float(value), 4),
            "bar": round(bar, 4),
            "met": bool(value >= bar if up else value <= bar),
        }
        for name, value, bar, up in held
    ]


def table(result: Mapping[str, Any]) -> str:
    """The systems as lines of text."""
    parts = list(next(iter(result["systems"].values()))["accuracy"])
    heads = " ".join(f"{part:>7}" for part in parts)
    lines = [f"{'':32} {'to teacher':>11} {'to real':>8} {'R':>6} {'sharp':>6}   accuracy: {heads}"]
    for name, values in result["systems"].items():
        numbers = [values.get("frechet_to_teacher"), values.get("frechet_to_real")]
        distances = " ".join(
            f"{'-' if x is None else format(x, '.2f'):>{width}}" for x, width in zip(numbers, (11, 8), strict=True)
        )
        accuracy = " ".join(f"{values['accuracy'][key]:7.3f}" for key in parts)
        r, sharp = values.get("unexplained"), values["sharpness"]
        explained = "-" if r is None else format(r, ".3f")
        lines.append(f"{name:32} {distances} {explained:>6} {sharp:6.2f}             {accuracy}")
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
