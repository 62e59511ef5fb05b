"""The pair job itself: what its manifest says, and shards made until none is missing."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections

from d2g_jax import records
from d2g_jax.config.configuration import compute_dtype
from d2g_jax.config.ranges import check_ranges
from d2g_jax.diffusion import noise, solvers
from d2g_jax.pairs.batches import Batch, Teacher, check_batch_size
from d2g_jax.pairs.claims import Claims
from d2g_jax.pairs.prompts import Prompts, read_prompts
from d2g_jax.pipeline import images
from d2g_jax.pipeline.conditioning import text_shapes, warn_of_prompts
from d2g_jax.pipeline.draw import Solution
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.pipeline.hub import folder_hash, resolve
from d2g_jax.records.schema import LATENT_DTYPES
from d2g_jax.runtime import buckets
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.ahead import one_ahead
from d2g_jax.runtime.atomic import TEMPORARY
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.interrupt import terminating
from d2g_jax.runtime.progress import Progress

FOLDER = Path("pairs", "1.0.0")
"""Where the job writes below its workdir."""

_WHAT_MAKES_A_PAIR = (
    "count", "pairs_per_prompt", "records_per_shard", "steps", "solver", "guidance_scale", "guidance_rescale",
    "negative_prompt", "seed", "dtype", "latent_dtype", "store_noise", "store_text",
)  # fmt: skip


def solution(config: ml_collections.ConfigDict) -> Solution:
    """How the teacher is solved, from `config.pairs`."""
    return Solution(
        steps=config.steps,
        guidance_scale=config.guidance_scale,
        guidance_rescale=config.guidance_rescale,
        negative_prompt=config.negative_prompt,
        solver=config.solver,
    )


def make_manifest(config: ml_collections.ConfigDict, pipeline: Pipeline, prompts: Prompts) -> records.Manifest:
    """What the pairs of this config are; raises `UserError` for settings out of range."""
    pairs = config.pairs
    check_ranges(ml_collections.ConfigDict({"pairs": pairs}))
    if pairs.latent_dtype not in LATENT_DTYPES:
        raise UserError(f"pairs.latent_dtype={pairs.latent_dtype!r}; choose one of {', '.join(LATENT_DTYPES)}")
    planned = planned_manifest(config, pipeline)  # refuses steps and solvers before gigabytes are hashed
    settings = {
        **{name: pairs[name] for name in _WHAT_MAKES_A_PAIR},
        "prompts": prompts.digest(),
        "teacher": folder_hash(pipeline.folder),
    }
    return dataclasses.replace(
        planned,
        teacher_hash=settings["teacher"],
        num_prompts=len(prompts.lines),
        num_distinct_prompts=prompts.distinct,
        config_hash=records.config_hash(settings),
    )


def planned_manifest(config: ml_collections.ConfigDict, pipeline: Pipeline) -> records.Manifest:
    """The manifest of pairs that this config would make, but for prompts and hashes: no program depends on those."""
    pairs = config.pairs
    schedule = solution(pairs).schedule(pipeline)
    height, width, channels = pipeline.latent_shape
    text = text_shapes(pipeline) if pairs.store_text else {}
    return records.Manifest(
        teacher=pipeline.folder.name,
        teacher_hash="",
        solver=pairs.solver,
        num_inference_steps=pairs.steps,
        guidance_scale=pairs.guidance_scale,
        prediction_type=schedule.prediction_type,
        first_timestep=solvers.first_timestep(pairs.solver, schedule, pairs.steps),
        scheduler=pipeline.scheduler,
        noise_implementation=noise.IMPLEMENTATION,
        seed=pairs.seed,
        scaling_factor=pipeline.scaling_factor,
        latent_shape=(channels, height, width),
        token_length=pipeline.token_length,
        latent_dtype=pairs.latent_dtype,
        store_noise=pairs.store_noise,
        text_shapes={name: list(shape) for name, shape in text.items()},
        num_prompts=pairs.count,
        num_distinct_prompts=pairs.count,
        num_records=pairs.count,
        num_shards=-(-pairs.count // pairs.records_per_shard),
        config_hash="",
    )


def load_teacher(config: ml_collections.ConfigDict) -> Teacher:
    """The teacher of a config on this process' own devices, with its prompts and manifest; all settings checked."""
    pairs = config.pairs
    mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp, jax.local_devices())
    reading = {"skip_empty": pairs.get("skip_empty", False), "asked": "pairs.prompts_column"}
    of_images = not pairs.prompts and images.is_of_images(resolve(config.pipeline))
    if not of_images:
        prompts = read_prompts(pairs.prompts, pairs.pairs_per_prompt, pairs.prompts_column, **reading)
    check_batch_size(pairs, mesh)
    pipeline = Pipeline.load(config.pipeline, compute_dtype("pairs.dtype", pairs.dtype), mesh)
    if of_images:
        prompts = Prompts(images.all_classes(pipeline.classes), pairs.pairs_per_prompt)
    check_prompts(pipeline, prompts, pairs.prompts)
    manifest = make_manifest(config, pipeline, prompts)
    return Teacher(pipeline, prompts, manifest, solution(pairs), mesh, pairs.batch_size)


def check_prompts(pipeline: Pipeline, prompts: Prompts, source: str) -> None:
    """Raises `UserError` for text that a teacher of images is given, and for classes that one of text is given."""
    if pipeline.classes is not None:
        images.class_ids(pipeline.classes, prompts.lines, pipeline.folder)
    elif all(line.strip().isdecimal() for line in prompts.lines):
        raise UserError(f"{source}: holds classes, and {pipeline.folder} is told text; give captions")


def make_pairs(config: ml_collections.ConfigDict, workdir: Path) -> Path:
    """Makes what is missing of `workdir`/pairs/1.0.0, together with whoever else does; returns that folder.

    `workdir` may be in a bucket (`buckets.py`). Several processes of one JAX job divide the shards by process index,
    and any processes that have the same config and see the same folder divide them by claims (`claims.py`). Each
    returns when all shards are whole.

    Raises `UserError` when the folder holds pairs of another config, or cannot be written.
    """
    teacher = load_teacher(config)
    warn_of_prompts(teacher.pipeline, teacher.prompts.lines)
    folder = buckets.as_path(workdir) / FOLDER
    with terminating(), Claims(folder, teacher.manifest, config.pairs.lease_seconds) as claims:
        teacher.manifest.write(folder)
        missing = records.missing_shards(folder, teacher.manifest)
        if missing:
            _make_missing(teacher, folder, missing, claims)
        _finish(folder, teacher.manifest, claims)
    return folder


def _make_missing(teacher: Teacher, folder: Path, missing: list[int], claims: Claims) -> None:
    """Makes shards, and waits for those of others, until none is missing."""
    m, index, count = teacher.manifest, jax.process_index(), jax.process_count()
    label = f"pairs, process {index + 1} of {count}" if count > 1 else "pairs"
    size = lambda shards: sum(len(records.shard_range(i, m.num_shards, m.num_records)) for i in shards)  # noqa: E731
    print(f"{label}: {m.num_prompts} prompts, {m.num_distinct_prompts} distinct", file=sys.stderr, flush=True)
    with Progress(label, size(missing), "img", beginning="compiling") as progress:
        made_bytes = 0
        while missing:
            made = []
            for info, shard in _make(teacher, folder, claims.take(claims.order(missing, index, count)), progress):
                claims.release(shard)
                made.append(shard)
                made_bytes += info.bytes
                progress.advance(0, f"{made_bytes / 1e6:.1f} MB")
            left = [shard for shard in missing if shard not in set(made)]
            missing = [shard for shard in left if not records.is_whole(folder, m, shard)]
            progress.leave_out(size(left) - size(missing))
            if missing and not made:
                progress.advance(0, "waiting for those who make the rest")
                claims.wait()


def _make(
    teacher: Teacher, folder: Path, shards: Iterator[int], progress: Progress
) -> Iterator[tuple[records.ShardInfo, int]]:
    """Makes shards as they come; the next is prepared and the next batch solved while one is written."""
    inputs = (teacher.prepare(shard) for shard in shards)
    with one_ahead(inputs) as prepared, one_ahead(teacher.solved(prepared)) as batches:
        for batch in batches:
            shard = batch.inputs.shard
            rest = itertools.islice(batches, teacher.batches_of(shard) - 1)
            content = _records(teacher, itertools.chain([batch], rest), progress)
            yield _write(teacher, folder, shard, content), shard


def _write(teacher: Teacher, folder: Path, shard: int, content: Iterator[dict[str, Any]]) -> records.ShardInfo:
    try:
        return records.write_shard(folder, teacher.manifest, shard, content, teacher.made_on)
    except UserError:
        # Another worker may have thought this one dead, made the shard and swept up, this one's temporary file too.
        if not records.is_whole(folder, teacher.manifest, shard):
            raise
        for _ in content:  # what is solved already belongs to this shard, not to the next
            pass
        return records.read_shard_info(folder, teacher.manifest, shard)


def _records(teacher: Teacher, batches: Iterable[Batch], progress: Progress) -> Iterator[dict[str, Any]]:
    for batch in batches:
        count = 0
        for record in teacher.records(batch):
            yield record
            count += 1
        progress.advance(count)


def _finish(folder: Path, manifest: records.Manifest, claims: Claims) -> None:
    """What is done once, by every worker that sees all shards whole: they write the same bytes."""
    for path in folder.glob(f".pairs-*{TEMPORARY}") if buckets.is_local(folder) else ():
        path.unlink(missing_ok=True)
    claims.clear()
    records.write_metadata(folder, manifest)
