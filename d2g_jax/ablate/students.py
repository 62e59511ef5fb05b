"""One student of an ablation: its config, what a config must have for it, and its throughput."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from d2g_jax.ablate.rows import Ablation, Row
from d2g_jax.config.configuration import with_settings
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.runs import flatten
from d2g_jax.train.setup import check_mismatches, load_metric, make_regression


def student_config(config: ml_collections.ConfigDict, row: Row, seed: int) -> ml_collections.ConfigDict:
    """The config of `d2g train` for a row and a seed: as given but for the row's changes.

    Only the last checkpoint is kept: that is what is judged, and there will be many students.
    """
    own = {"name": row.name, "seed": seed, "train.keep_checkpoints": 1, "train.keep_best": ""}
    return with_settings(config, dict(row.changes) | own)


def check_config(config: ml_collections.ConfigDict, ablation: Ablation) -> None:
    """Raises `UserError` for a config under which two rows would be the same run, or one could not be timed."""
    flat = flatten(config.to_dict())
    for key, off in ablation.switches:
        if flat[key] == off:
            rows = [row.title for row in ablation.rows if (key, off) not in row.changes]
            raise UserError(
                f"{key} is {off} in this config, so that the row {rows[0]!r} would be that before it; give "
                f"--config.{key} another value"
            )
    t = config.train
    if t.images < 1:
        raise UserError(f"train.images={t.images}: the students would not be trained; give 1 or more")
    for row in ablation.rows:
        begins = last_phase(student_config(config, row, 0))
        if t.images <= begins:
            raise UserError(
                f"train.images={t.images}: the adversary's part of {row.title!r} begins after {begins}; train for "
                "longer, or lower adversarial.start_images or adversarial.warmup_images"
            )
        if begins and begins + 2 * t.log_every > t.images:
            raise UserError(
                f"train.log_every={t.log_every}: no line of metrics.jsonl would be of the last {t.images - begins} "
                f"images alone, by which {row.title!r} is timed; give at most {(t.images - begins) // 2}"
            )


def check_rows(config: ml_collections.ConfigDict, ablation: Ablation) -> None:
    """Raises `UserError`, before the first is trained, for what a row's training would refuse.

    That is a loss that is none, a metric that cannot be read, and mix-and-match that finds no neighbours.
    """
    pipeline = Pipeline.load(config.pipeline, without=("text_encoder", "text_encoder_2", "unet"))
    students = [student_config(config, row, 0) for row in ablation.rows]
    for student in students:
        check_mismatches(student)
    for loss in {student.loss.to_json(): student.loss for student in students}.values():
        make_regression(loss, load_metric(loss, pipeline))


def last_phase(config: ml_collections.ConfigDict) -> int:
    """Images after which training is what it is until its end: the generator listens to the discriminator, if any."""
    a = config.adversarial
    return a.start_images + a.warmup_images if a.weight else 0


def images_per_second(lines: Sequence[Mapping[str, Any]], begins: int) -> float:
    """Training throughput after `begins` images, from the lines of a metrics.jsonl: the median over them.

    Their clock starts when the steps are compiled. Most lines are of steps alone; the median leaves aside those that
    also hold a picture or a checkpoint.
    """
    marks = [(0, 0.0), *((line["images"], line["seconds"]) for line in lines)]
    rates = [(b - a) / (until - since) for (a, since), (b, until) in itertools.pairwise(marks) if a >= begins]
    return statistics.median(rates)
