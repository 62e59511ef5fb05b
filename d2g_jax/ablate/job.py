"""`d2g ablate`: every row of an ablation trained from the same pairs with every seed, timed, and judged."""

from __future__ import annotations

import dataclasses
import datetime
import gc
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from d2g_jax import pairs, records
from d2g_jax.ablate.judge import StudentJudge, check_images
from d2g_jax.ablate.rows import Ablation, Row
from d2g_jax.ablate.students import check_config, check_rows, images_per_second, last_phase, student_config
from d2g_jax.ablate.table import progress_line, summarize, table
from d2g_jax.demo.judge import check_evaluation
from d2g_jax.report.status import read_status
from d2g_jax.runtime import atomic, runs
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.interrupt import terminating
from d2g_jax.runtime.lock import locked
from d2g_jax.train import train


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be done, and where.

    Attributes:
      judge: None for another teacher than the digits', whose students are only timed here.
    """

    config: ml_collections.ConfigDict
    workdir: Path
    ablation: Ablation
    seeds: Sequence[int]
    pairs_folder: Path
    judge: StudentJudge | None

    def folder(self, row: Row, seed: int) -> Path:
        """The workdir of a student's `d2g train`."""
        return self.workdir / "students" / row.name / f"seed{seed}"


Students = dict[str, dict[int, dict[str, Any]]]
"""What figures/ROW-seedN.json hold, by row and seed."""


def ablate(
    config: ml_collections.ConfigDict,
    workdir: Path,
    ablation: Ablation,
    seeds: Sequence[int],
    pairs_folder: Path | None = None,
) -> str:
    """Runs or resumes all students and returns their table as Markdown.

    Goes seed by seed, so that a table of all rows is there early. A student that has its figures is not touched again.

    Args:
      config: of `d2g train`. With a section `evaluation`, the digits', students are judged here; without one only
        their speed is measured, and the table is followed by the commands that judge them.
      workdir: gets students/ROW/seedN/ (workdirs of `d2g train`), figures/ROW-seedN.json, evaluation/,
        ablation.json (rewritten after every student), and pairs/ unless they are given.
      pairs_folder: a finished `pairs/1.0.0` by this config; None makes the pairs in `workdir`.

    Raises:
      UserError: as `d2g pairs` and `d2g train`; a config that makes rows equal; a workdir of another ablation.
      KeyboardInterrupt, Terminated: SIGINT or SIGTERM came; the same call goes on.
    """
    check_config(config, ablation)
    judged = "evaluation" in config
    if judged:
        check_evaluation(config)
        check_images(config)
    check_rows(config, ablation)
    with locked(workdir), terminating():
        given = None if pairs_folder is None else _check_pairs(config, pairs_folder)
        runs.claim(workdir, _identity(config, ablation, given))
        done = _finished(config, workdir, ablation, seeds)
        folder = pairs.make_pairs(config, workdir) if pairs_folder is None else pairs_folder
        judge = StudentJudge(config, workdir, folder) if judged else None
        job = Job(config, workdir, ablation, seeds, folder, judge)
        for seed, row in itertools.product(seeds, ablation.rows):
            if seed not in done[row.name]:
                done[row.name][seed] = _make(job, row, seed)
                _write_result(job, done)
        text = table(_write_result(job, done))
        return text if judged else f"{text}\n\n{_how_to_judge(job)}"


def _identity(
    config: ml_collections.ConfigDict, ablation: Ablation, given: records.Manifest | None
) -> ml_collections.ConfigDict:
    """What a workdir is bound to. One level down, no setting is free to change: lengths and speeds are compared."""
    made = "" if given is None else given.config_hash
    return ml_collections.ConfigDict({"job": f"ablate {ablation.name}", "pairs": made, "config": config.to_dict()})


def _check_pairs(config: ml_collections.ConfigDict, folder: Path) -> records.Manifest:
    """Raises `UserError` unless the pairs were solved as the config says: the teacher is drawn by it for comparison."""
    manifest, p = records.Manifest.read(folder), config.pairs
    for key, made in (
        ("seed", manifest.seed),
        ("solver", manifest.solver),
        ("steps", manifest.num_inference_steps),
        ("guidance_scale", manifest.guidance_scale),
    ):
        if made != p[key]:
            raise UserError(f"{folder}: pairs made with {key}={made}; give --config.pairs.{key}={made}, not {p[key]}")
    return manifest


def _figures_file(workdir: Path, row: Row, seed: int) -> Path:
    return workdir / "figures" / f"{row.name}-seed{seed}.json"


def _finished(config: ml_collections.ConfigDict, workdir: Path, ablation: Ablation, seeds: Sequence[int]) -> Students:
    """Those whose figures are there; raises `UserError` for a file of something else."""
    done: Students = {row.name: {} for row in ablation.rows}
    for seed, row in itertools.product(seeds, ablation.rows):
        if (file := _figures_file(workdir, row, seed)).exists():
            done[row.name][seed] = _read_figures(file, student_config(config, row, seed))
    return done


def _read_figures(file: Path, student: ml_collections.ConfigDict) -> dict[str, Any]:
    try:
        made = json.loads(file.read_text(encoding="utf-8"))
        same = made["config_hash"] == runs.config_hash(student)
        if "images_per_second" not in made["figures"]:  # which every student has
            raise KeyError("images_per_second")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not the figures of a student ({error}); remove it to judge again") from error
    if not same:
        raise UserError(f"{file}: of a student with another config; remove it, or choose another --workdir")
    return made


def _make(job: Job, row: Row, seed: int) -> dict[str, Any]:
    """Trains a student, measures it, and writes its file of figures, whose content is returned."""
    folder, student = job.folder(row, seed), student_config(job.config, row, seed)
    print(f"d2g ablate: {row.title}, seed {seed}", file=sys.stderr, flush=True)
    train(student, folder, job.pairs_folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    figures = {} if job.judge is None else job.judge.score(folder)
    figures["images_per_second"] = images_per_second(lines, last_phase(student))
    status = read_status(folder)
    if status is not None and "steps" in status.memory:  # neither of a student that an earlier version has trained
        figures["step_gib"] = status.memory["steps"]
    made = {
        "config_hash": runs.config_hash(student),
        "figures": {name: float(f"{value:.6g}") for name, value in figures.items()},
        "last_line": lines[-1],
        "environment": {**runs.environment(), "date": datetime.date.today().isoformat()},
    }
    atomic.write_json(_figures_file(job.workdir, row, seed), made)
    print(f"d2g ablate: {row.title}, seed {seed}: {progress_line(figures)}", file=sys.stderr, flush=True)
    _forget_programs()
    return made


def _forget_programs() -> None:
    """Those of all students would else stay in memory."""
    jax.clear_caches()
    gc.collect()


def _write_result(job: Job, done: Students) -> dict[str, Any]:
    """Writes ablation.json, of what is done, and returns its content."""
    ablation, seeds, manifest = job.ablation, job.seeds, records.Manifest.read(job.pairs_folder)
    figures = {row: {seed: of[seed]["figures"] for seed in seeds if seed in of} for row, of in done.items()}
    environments = [one["environment"] for of in done.values() for one in of.values()]
    protocol = {
        "images": job.config.train.images,
        "batch_size": job.config.train.batch_size,
        "pairs": manifest.num_records,
        "pairs_hash": manifest.config_hash,
        "seeds": "of training: order of the data, augmentation, D's new layers, mix-and-match; the pairs and G's first "
        "parameters, the teacher's, are the same",
        "images_per_second": "median over the lines of metrics.jsonl of the last phase of training; compilation is "
        "before their clock",
    }
    result = {
        "ablation": ablation.name,
        "title": ablation.title,
        "complete": all(len(of) == len(seeds) for of in figures.values()),
        "seeds": [seed for seed in seeds if any(seed in of for of in figures.values())],
        "protocol": protocol | ({} if job.judge is None else job.judge.protocol),
        "rows": summarize(ablation, figures),
        **({} if job.judge is None else {"floor": float(f"{job.judge.floor:.6g}")}),
        "published": ablation.published,
        "environments": [one for i, one in enumerate(environments) if one not in environments[:i]],
    }
    atomic.write_json(job.workdir / "ablation.json", result)
    return result


def _how_to_judge(job: Job) -> str:
    """The commands for students of another teacher than the digits'."""
    lines = ["Judge the students, with the files of docs/evaluate.md:"]
    for row, seed in itertools.product(job.ablation.rows, job.seeds):
        out = job.workdir / "evaluation" / f"{row.name}-seed{seed}.json"
        lines.append(
            f"d2g evaluate --protocol=coco2014-30k --prompts=PROMPTS.txt --reference=REFERENCE.npz "
            f"--weights-inception=FILE.pt --model={job.folder(row, seed)} --out={out}"
        )
    return "\n".join(lines)
