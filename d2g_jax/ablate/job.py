"""`d2g ablate`: every row of an ablation trained from the same pairs with every seed, timed, and judged."""

from __future__ import annotations

import datetime
import gc
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from d2g_jax import atomic, pairs, records, runs
from d2g_jax.ablate.judge import DigitsJudge, check_digits
from d2g_jax.ablate.rows import Ablation, Row
from d2g_jax.ablate.students import check_config, images_per_second, last_phase, student_config
from d2g_jax.ablate.table import progress_line, summarize, table
from d2g_jax.errors import UserError
from d2g_jax.interrupt import terminating
from d2g_jax.lock import locked
from d2g_jax.train import train


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
        check_digits(config)
    with locked(workdir), terminating():
        given = None if pairs_folder is None else _check_pairs(config, pairs_folder)
        runs.claim(workdir, _identity(config, ablation, given))
        folder = pairs.make_pairs(config, workdir) if pairs_folder is None else pairs_folder
        judge = DigitsJudge(config, workdir, folder) if judged else None
        done = _finished(config, workdir, ablation, seeds)
        for seed, row in itertools.product(seeds, ablation.rows):
            if seed not in done[row.name]:
                done[row.name][seed] = _make(config, workdir, row, seed, folder, judge)
                _write_result(workdir, _result(config, ablation, seeds, folder, done, judge))
        result = _result(config, ablation, seeds, folder, done, judge)
        _write_result(workdir, result)
        return table(result) if judged else f"{table(result)}\n\n{_how_to_judge(workdir, ablation, seeds)}"


def student_folder(workdir: Path, row: Row, seed: int) -> Path:
    """The workdir of its `d2g train`."""
    return workdir / "students" / row.name / f"seed{seed}"


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


def _finished(
    config: ml_collections.ConfigDict, workdir: Path, ablation: Ablation, seeds: Sequence[int]
) -> dict[str, dict[int, dict[str, Any]]]:
    """By row and seed what the files of figures hold that are there; raises `UserError` for those of another student."""
    done: dict[str, dict[int, dict[str, Any]]] = {row.name: {} for row in ablation.rows}
    for seed, row in itertools.product(seeds, ablation.rows):
        if (file := _figures_file(workdir, row, seed)).exists():
            done[row.name][seed] = _read_figures(file, student_config(config, row, seed))
    return done


def _figures_file(workdir: Path, row: Row, seed: int) -> Path:
    return workdir / "figures" / f"{row.name}-seed{seed}.json"


def _make(
    config: ml_collections.ConfigDict,
    workdir: Path,
    row: Row,
    seed: int,
    pairs_folder: Path,
    judge: DigitsJudge | None,
) -> dict[str, Any]:
    """Trains a student, measures it, and writes figures/ROW-seedN.json, whose content is returned."""
    folder, student = student_folder(workdir, row, seed), student_config(config, row, seed)
    print(f"d2g ablate: {row.title}, seed {seed}", file=sys.stderr, flush=True)
    train(student, folder, pairs_folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    figures = {} if judge is None else judge.score(folder)
    figures["images_per_second"] = images_per_second(lines, last_phase(student))
    made = {
        "config_hash": runs.config_hash(student),
        "figures": {name: float(f"{value:.6g}") for name, value in figures.items()},
        "last_line": lines[-1],
        "environment": {**runs.environment(), "date": datetime.date.today().isoformat()},
    }
    atomic.write_text(_figures_file(workdir, row, seed), json.dumps(made, indent=2) + "\n")
    print(f"d2g ablate: {row.title}, seed {seed}: {progress_line(figures)}", file=sys.stderr, flush=True)
    jax.clear_caches()  # else the programs of all students would stay in memory
    gc.collect()
    return made


def _read_figures(file: Path, student: ml_collections.ConfigDict) -> dict[str, Any]:
    try:
        made = json.loads(file.read_text(encoding="utf-8"))
        same = made["config_hash"] == runs.config_hash(student)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not the figures of a student ({error}); remove it to judge again") from error
    if not same:
        raise UserError(f"{file}: of a student with another config; remove it, or choose another --workdir")
    return made


def _write_result(workdir: Path, result: Mapping[str, Any]) -> None:
    atomic.write_text(workdir / "ablation.json", json.dumps(result, indent=2) + "\n")


def _result(
    config: ml_collections.ConfigDict,
    ablation: Ablation,
    seeds: Sequence[int],
    pairs_folder: Path,
    done: Mapping[str, Mapping[int, Mapping[str, Any]]],
    judge: DigitsJudge | None,
) -> dict[str, Any]:
    """What ablation.json holds, of what is done."""
    manifest = records.Manifest.read(pairs_folder)
    figures = {
        row: {seed: by_seed[seed]["figures"] for seed in seeds if seed in by_seed} for row, by_seed in done.items()
    }
    environments = [one["environment"] for by_seed in done.values() for one in by_seed.values()]
    protocol = {
        "images": config.train.images,
        "batch_size": config.train.batch_size,
        "pairs": manifest.num_records,
        "pairs_hash": manifest.config_hash,
        "seeds": "of training: order of the data, augmentation, D's new layers, mix-and-match; the pairs and G's first "
        "parameters, the teacher's, are the same",
        "images_per_second": "median over the lines of metrics.jsonl of the last phase of training; compilation is "
        "before their clock",
    }
    return {
        "ablation": ablation.name,
        "title": ablation.title,
        "complete": all(len(by_seed) == len(seeds) for by_seed in figures.values()),
        "seeds": [seed for seed in seeds if any(seed in by_seed for by_seed in figures.values())],
        "protocol": protocol | ({} if judge is None else judge.protocol),
        "rows": summarize(ablation, figures),
        **({} if judge is None else {"floor": float(f"{judge.floor:.6g}")}),
        "published": ablation.published,
        "environments": [one for i, one in enumerate(environments) if one not in environments[:i]],
    }


def _how_to_judge(workdir: Path, ablation: Ablation, seeds: Sequence[int]) -> str:
    """The commands for students of another teacher than the digits'."""
    lines = ["Judge the students, with the files of docs/evaluate.md:"]
    for row in ablation.rows:
        for seed in seeds:
            out = workdir / "evaluation" / f"{row.name}-seed{seed}.json"
            lines.append(
                f"d2g evaluate --protocol=coco2014-30k --prompts=PROMPTS.txt --reference=REFERENCE.npz "
                f"--weights-inception=FILE.pt --model={student_folder(workdir, row, seed)} --out={out}"
            )
    return "\n".join(lines)
