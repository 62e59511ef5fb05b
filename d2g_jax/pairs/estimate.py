"""What a pair job would take, before it starts: records, shards, bytes, FLOPs, hours. Nothing is written."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from d2g_jax import records
from d2g_jax.models.platform import ANY, compiling_for
from d2g_jax.pairs.batches import Teacher
from d2g_jax.pairs.job import FOLDER, load_teacher
from d2g_jax.pipeline.conditioning import encode_text
from d2g_jax.pipeline.draw import draw, teacher_programs
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.runtime import buckets

PUBLISHED_PEAKS = {"H100 SXM": 989.4e12, "TPU v5p": 459e12}
"""Dense bf16 FLOP/s of one chip, as published by their makers; not measured here."""

SHARE_OF_PEAK = 0.4
"""What a solver is assumed to reach of them; not measured here."""

TIMED_STEPS = 2
"""A batch of so few steps is timed, and scaled by network calls: they take all but a fraction of the time."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a job takes.

    Attributes:
      num_records, num_shards: of the whole folder; `missing` records of them are still to be made.
      bytes_by_part: of one record; "prompt, keys, framing" has the mean prompt.
      flops_per_image: network calls, both halves of guidance, and one pass of the text towers.
      seconds_per_image: of this process' devices, from a timed batch; None if not timed.
      devices: which those are.
    """

    num_records: int
    num_shards: int
    missing: int
    bytes_by_part: dict[str, int]
    flops_per_image: float
    seconds_per_image: float | None
    devices: str

    def hours(self) -> dict[str, float]:
        """Hours for the missing records, by device; those from published peaks at `SHARE_OF_PEAK` for one chip."""
        flops = self.missing * self.flops_per_image
        by_peak = {
            f"one {name}, {SHARE_OF_PEAK:.0%} of its published {peak / 1e12:.0f} bf16 TFLOP/s": flops
            / (SHARE_OF_PEAK * peak)
            / 3600
            for name, peak in PUBLISHED_PEAKS.items()
        }
        if self.seconds_per_image is None:
            return by_peak
        return {f"{self.devices}, from a timed batch": self.missing * self.seconds_per_image / 3600, **by_peak}

    def __str__(self) -> str:
        record = sum(self.bytes_by_part.values())
        parts = ", ".join(f"{name} {size:,.0f}" for name, size in self.bytes_by_part.items())
        lines = [
            f"records     {self.num_records:,} in {self.num_shards:,} shards; {self.missing:,} still to be made",
            f"bytes       {record * self.num_records / 1e9:,.3f} GB, {record:,.0f} a record: {parts}",
            f"FLOPs       {self.flops_per_image:.4g} an image, {self.missing * self.flops_per_image:.4g} in all",
        ]
        hours = {name: f"{hours:,.2f}" if hours >= 0.1 else f"{hours:.2g}" for name, hours in self.hours().items()}
        return "\n".join(lines + [f"hours       {number} on {name}" for name, number in hours.items()])


def estimate(config: ml_collections.ConfigDict, workdir: Path, *, timed: bool = True) -> Estimate:
    """The cost of `make_pairs(config, workdir)`; raises the errors that it would raise before the first record."""
    teacher, folder = load_teacher(config), buckets.as_path(workdir) / FOLDER
    m, missing = teacher.manifest, list(range(teacher.manifest.num_shards))
    if m.is_of(folder):
        missing = records.missing_shards(folder, m)
    flops = teacher.solution.network_calls * unet_flops(teacher.pipeline) + _flops(*_text_call(teacher.pipeline))
    prompt = round(sum(len(line.encode()) for line in teacher.prompts.lines) / len(teacher.prompts.lines))
    return Estimate(
        num_records=m.num_records,
        num_shards=m.num_shards,
        missing=sum(len(records.shard_range(i, m.num_shards, m.num_records)) for i in missing),
        bytes_by_part={**m.schema().bytes_by_part(), "prompt, keys, framing": m.schema().overhead(prompt)},
        flops_per_image=flops,
        seconds_per_image=_time(teacher) if timed else None,
        devices=teacher.made_on,
    )


def unet_flops(pipeline: Pipeline) -> float:
    """FLOPs of one network call for one image, as XLA counts those of the program before it is compiled."""
    height, width, channels = pipeline.latent_shape
    sample = jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32)
    step = jax.ShapeDtypeStruct((1,), jnp.int32)
    text = jax.eval_shape(*_text_call(pipeline))
    call = lambda params, x, t, c: pipeline.unet.apply(params, x, t, *c)  # noqa: E731
    return _flops(call, pipeline.unet.abstract(), sample, step, text)


def _text_call(pipeline: Pipeline) -> tuple[Any, ...]:
    """The text towers for one prompt: a function and the shapes of its arguments."""
    towers = {name: tower.abstract() for name, tower in pipeline.towers.items()}
    return functools.partial(encode_text, pipeline), towers, jax.ShapeDtypeStruct((1, pipeline.token_length), jnp.int32)


def _flops(call: Callable[..., Any], *arguments: Any) -> float:
    # XLA does not look into the kernels that stand for attention on accelerators, and counts a CPU's loops once.
    with compiling_for(ANY):
        return float(jax.jit(call).lower(*arguments).cost_analysis()["flops"])


def _time(teacher: Teacher) -> float:
    """Seconds per image of the whole solution, from the second of two short batches."""
    short = dataclasses.replace(teacher.solution, steps=min(TIMED_STEPS, teacher.solution.steps))
    programs = teacher_programs(teacher.pipeline, teacher.mesh, short)
    size = teacher.batch_size
    drawn = np.zeros((size, *teacher.manifest.latent_shape), np.float32)
    ids = np.zeros((size, teacher.manifest.token_length), np.int32)
    for _ in range(2):
        seconds: dict[str, float] = {}
        list(
            draw(programs, teacher.mesh, drawn, ids, size, images=False, seconds=seconds, name=teacher.pipeline.folder)
        )
    return (seconds["text"] + seconds["unet"] * teacher.solution.network_calls / short.network_calls) / size
