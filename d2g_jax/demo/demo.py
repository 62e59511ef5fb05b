"""`d2g demo`: the whole job on the embedded digits teacher, measured: pairs, students, figures, report."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from d2g_jax import pairs
from d2g_jax.config.configuration import with_settings
from d2g_jax.demo import evaluation
from d2g_jax.demo.held_out import HeldOut, cached, latents_of_pairs
from d2g_jax.demo.judge import check_evaluation, judge_of
from d2g_jax.inputs.text import read_json
from d2g_jax.pipeline.draw import decode_all
from d2g_jax.report import LivePage, finish
from d2g_jax.report.status import peak_memory
from d2g_jax.runtime import atomic, runs
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.grid import grid, save_png
from d2g_jax.runtime.lock import locked
from d2g_jax.sample import sampler as sample
from d2g_jax.train import train
from d2g_jax.train.setup import check_mismatches

ONE_STEP = "teacher, 1 step"
STUDENTS = {
    "mse": "MSE student, 1 step",
    "pseudo_huber": "pseudo-Huber student, 1 step",
    "latent_lpips": "LatentLPIPS student, 1 step",
    "e_latent_lpips": "E-LatentLPIPS student, 1 step",
    "full": "full student, 1 step",
}
ONLY_IN_FULL = ("pseudo_huber", "latent_lpips")
SHOWN = 12
ENLARGED, SCALE = 6, 4
"""Columns of the README's grid, and pixels for one of an image."""


def teacher_title(config: ml_collections.ConfigDict) -> str:
    """What tables call the teacher, solved as for the pairs."""
    return f"teacher, {config.pairs.steps} steps"


def student_configs(config: ml_collections.ConfigDict, *, full: bool) -> dict[str, ml_collections.ConfigDict]:
    """One config per student: the same pairs, images and seed; only the loss differs."""
    configs = {}
    for name in STUDENTS:
        if name in ONLY_IN_FULL and not full:
            continue
        changes: dict[str, Any] = {"name": name}
        if name != "full":
            changes |= {"loss.name": name, "adversarial.weight": 0.0}
        if name in ("mse", "pseudo_huber"):
            changes["loss.l1_weight"] = 0.0
        configs[name] = with_settings(config, changes)
    return configs


def demo(config: ml_collections.ConfigDict, workdir: Path, *, full: bool = False) -> str:
    """Runs or resumes everything in `workdir` and returns the table of results as text.

    Writes pairs/, students/NAME/, evaluation/, samples/, metrics.jsonl, result.json, report.html.

    Raises `UserError` before any work for samples that could not be judged as the section `evaluation` says, and for
    what the last student's training would refuse.
    """
    check_evaluation(config)
    students = student_configs(config, full=full)
    for student in students.values():
        check_mismatches(student)
    with locked(workdir):
        runs.claim(workdir, config)
        stages = 3 + len(students)  # pairs, students, teacher samples, evaluate
        with LivePage(workdir, stages, "stages") as page:
            clock = Clock(workdir, page)
            with clock.stage("pairs"):
                pairs_folder = pairs.make_pairs(config, workdir)
            for name, student in students.items():
                with clock.stage(f"train {name}", f", see students/{name}/report.html"):
                    train(student, workdir / "students" / name, pairs_folder)
                _merge_metrics(workdir)
            result = measure(config, workdir, pairs_folder, clock, full=full)
        atomic.write_json(workdir / "result.json", result)
        report = finish(workdir, stages, "stages")
        return f"{evaluation.table(result)}\n\n{report}"


class Clock:
    """Seconds per stage, added up over interrupted runs and kept of a finished one; the page says which one it is."""

    def __init__(self, workdir: Path, page: LivePage):
        self._file, self._page, self._begun = workdir / "seconds.json", page, 0
        self.seconds: dict[str, float] = read_json(self._file, "remove it") if self._file.exists() else {}
        self._kept = set(self.seconds) if (workdir / "result.json").exists() else set()

    @contextmanager
    def stage(self, name: str, remark: str = "") -> Iterator[None]:
        print(f"d2g demo: {name}", file=sys.stderr, flush=True)
        self._page.update(name + remark, self._begun, at_once=True)
        self._begun += 1
        start = time.monotonic()
        try:
            yield
        finally:
            if name not in self._kept:
                self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - start, 1)
                atomic.write_text(self._file, json.dumps(self.seconds))


def _merge_metrics(workdir: Path) -> None:
    """One metrics.jsonl of all students, each line with its run's name."""
    files = [workdir / "students" / name / "metrics.jsonl" for name in STUDENTS]
    atomic.write_text(workdir / "metrics.jsonl", "".join(file.read_text() for file in files if file.exists()))


def measure(
    config: ml_collections.ConfigDict, workdir: Path, pairs_folder: Path, clock: Clock, *, full: bool
) -> dict[str, Any]:
    """Draws every system on the same held-out noise and prompts and scores it; see `result.json`."""
    e = config.evaluation
    mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp)
    teacher, title = sample.Sampler.load(config.pipeline, mesh), teacher_title(config)
    held_out, solution = HeldOut.make(config, teacher.pipeline, mesh), pairs.solution(config.pairs)
    systems, latents = {title: teacher.programs(mesh, solution)}, {}
    with clock.stage("teacher samples"):
        latents[title] = cached(workdir / "evaluation" / "teacher.npy", held_out, lambda: systems[title])
    with clock.stage("evaluate"):
        systems[ONE_STEP] = teacher.programs(mesh, dataclasses.replace(solution, steps=1))
        for name in student_configs(config, full=full):
            systems[STUDENTS[name]] = sample.Sampler.load(workdir / "students" / name, mesh).programs(mesh)
        latents |= {name: held_out.solve(programs) for name, programs in systems.items() if name not in latents}
        calls = {name: programs.network_calls for name, programs in systems.items()}
        others = latents_of_pairs(pairs_folder, e.samples)
        drawn = decode_all(teacher.pipeline, mesh, np.concatenate([*latents.values(), others]), e.batch_size)
        *parts, other_images = np.split(drawn, e.samples * np.arange(1, len(latents) + 1))
        images = dict(zip(latents, parts, strict=True))
        kinds = {"teacher": title, **STUDENTS}
        prompts = held_out.prompts
        result = evaluation.score(judge_of(config), images, other_images, prompts, calls, latents, kinds)
        _show(workdir, [p.prompt for p in prompts[:SHOWN]], images)
    result["protocol"] |= {**held_out.protocol, "guidance_scale": solution.guidance_scale}
    result["environment"] = {**runs.environment(), "peak_memory_gib": peak_memory()["host"]}
    return {**result, "seconds": clock.seconds}


def _show(workdir: Path, prompts: list[str], images: dict[str, np.ndarray]) -> None:
    """Side by side for the same noise and prompt: single images for the report, one grid for the README."""
    columns = []
    for number, (name, drawn) in enumerate(images.items()):
        files = [f"samples/{number}/{i:05d}.png" for i in range(len(prompts))]
        for file, image in zip(files, drawn, strict=False):
            save_png(workdir / file, image)
        columns.append({"name": name, "images": files})
    atomic.write_text(workdir / "samples" / "comparison.json", json.dumps({"prompts": prompts, "columns": columns}))
    rows = np.concatenate([drawn[:ENLARGED] for name, drawn in images.items() if name != ONE_STEP])
    save_png(workdir / "samples" / "grid.png", grid(rows.repeat(SCALE, 1).repeat(SCALE, 2), ENLARGED, 2 * SCALE))
