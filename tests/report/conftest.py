"""A workdir with everything that a page can show."""

import json
import math

import numpy as np
import pytest

from d2g_jax.runtime.grid import grid, save_png


def write(path, data):
    path.write_text(json.dumps(data), "utf-8")


@pytest.fixture
def workdir(tmp_path):
    """A finished demo with everything that a page can show."""
    folder = tmp_path / "digits-demo"
    folder.mkdir()
    environment = {"device": "2 cores", "versions": {"jax": "0.10.2"}}
    loss = {"regression": "e_latent_lpips", "l1_weight": 1.0}
    train = {"images": 320, "learning_rate": 1e-5, "mix_and_match": True, "loss": loss}
    write(folder / "config.json", {"seed": 7, "train": train, "environment": environment})
    lines = [
        {
            "run": run,
            "images": 32 * k,
            "step": k,
            "seconds": 0.5 * k,
            "regression": 10.0 ** (-k / 3),
            "latent_std_ratio": level,
        }
        for run, level in (("mse", 0.5), ("full", 1.0))
        for k in range(1, 11)
    ]
    lines += [
        {"run": "full", "images": 352, "step": 11, "seconds": 6.0, "regression": math.nan, "latent_std_ratio": 1.0}
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    scores = {"digit": 0.9, "weight": 0.95, "slant": 0.99, "all": 0.85}
    result = {
        "protocol": {"name": "digits", "samples": 2000},
        "systems": {
            "real test images": {"frechet_to_teacher": None, "frechet_to_real": 0.31, "accuracy": scores},
            "MSE-only student": {"frechet_to_teacher": 14.125, "frechet_to_real": 15.0, "network_calls": 1},
            "full student": {"frechet_to_teacher": 2.5, "seconds_per_image": 0.0012, "accuracy": scores},
        },
        "floors": {"teacher_vs_teacher": 0.087},
        "checks": [
            {"name": "near the teacher", "value": 0.951, "bar": "≥ 0.95", "met": True},
            {"name": "full no worse", "value": 2.91, "bar": "≤ 2.71", "met": False},
            {"name": "memory", "value": None, "bar": 4, "met": None},
        ],
        "seconds": {"pairs": 115.2, "train_full": 84.0},
        "environment": environment,
    }
    write(folder / "result.json", result)
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    for name in ("teacher", "full"):
        save_png(folder / "samples" / name / "00000.png", image)
    for step in (0, 5, 10):
        save_png(folder / "samples" / f"images_{step:08d}.png", grid(image[None].repeat(8, 0), 4))
    columns = [
        {"name": "teacher, 50 steps", "images": ["samples/teacher/00000.png", "samples/teacher/00000.png"]},
        {"name": "student, 1 step", "images": ["samples/full/00000.png", "samples/full/missing.png"]},
    ]
    write(folder / "samples" / "comparison.json", {"prompts": ["a bold seven", "a thin one"], "columns": columns})
    return folder


@pytest.fixture
def gallery(workdir):
    """The same workdir with what a run draws at its end."""
    rng = np.random.default_rng(1)

    def draw(name, count):
        for number in range(count):
            save_png(workdir / "samples" / name / f"{number:02d}.png", rng.integers(0, 255, (32, 32, 3), np.uint8))
        return [f"samples/{name}/{number:02d}.png" for number in range(count)]

    (student,), pairs = draw("held_out", 1), draw("nearest", 2)
    neighbours = [
        {"id": 40 + k, "prompt": f"pair {40 + k}", "distance": 0.25 * (k + 1), "image": pairs[k]} for k in range(2)
    ]
    walks = [
        {"of": "prompts", "prompts": ["a bold seven", "a thin one"], "images": draw("walk_prompts", 8)},
        {"of": "noise", "prompts": ["a bold seven"], "images": draw("walk_noise", 8)},
    ]
    nearest = {
        "searched": 4096,
        "pairs": 10_000,
        "between_pairs": 0.4321,
        "rows": [{"prompt": "a bold seven", "image": student, "neighbours": neighbours}],
    }
    sides = zip(draw("beside_student", 2), draw("beside_teacher", 2), (0.75, 0.125), strict=True)
    rows = [{"prompt": "held out", "distance": far, "student": a, "teacher": b} for a, b, far in sides]
    teacher = {"by": "LatentLPIPS", "pairs": 64, "mean": 0.31, "rows": rows}
    write(workdir / "samples" / "gallery.json", {"images": 320, "walks": walks, "nearest": nearest, "teacher": teacher})
    return workdir
