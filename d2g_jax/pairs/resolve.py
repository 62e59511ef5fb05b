"""Records of a finished folder solved again by the teacher, and compared with what is stored."""

from __future__ import annotations

from pathlib import Path

import jax
import ml_collections
import numpy as np

from d2g_jax import records
from d2g_jax.pairs.batches import Teacher
from d2g_jax.pairs.job import load_teacher
from d2g_jax.runtime import buckets
from d2g_jax.runtime.errors import UserError

TOLERANCE = 0.05
"""Root mean square of the difference over that of the stored latents, where bits cannot be expected to agree."""


def resolve(config: ml_collections.ConfigDict, folder: Path, count: int, seed: int = 0) -> list[records.Problem]:
    """Solves `count` records, chosen by `seed`, again; an empty list means that all agree.

    A shard that was made by the same libraries on the same devices with the same batch size must agree to the bit: a
    record is solved at its own place in its own batch. Any other shard must agree to within `TOLERANCE`.

    Raises `UserError` when `config` is not the one that made the folder, or a shard is not whole.
    """
    folder, teacher = buckets.as_path(folder), load_teacher(config)
    teacher.manifest.check_same(folder)
    total = teacher.manifest.num_records
    if count < 1:
        raise UserError(f"--resolve={count}: solve at least one record again")
    source = records.PairSource(folder, fields=("latents",))
    chosen = sorted(np.random.default_rng(seed).choice(total, min(count, total), replace=False).tolist())
    problems = []
    for shard in range(teacher.manifest.num_shards):
        ids = records.shard_range(shard, teacher.manifest.num_shards, total)
        if places := [i - ids.start for i in chosen if i in ids]:
            problems += _compare(teacher, source, shard, places)
    return problems


def _compare(teacher: Teacher, source: records.PairSource, shard: int, places: list[int]) -> list[records.Problem]:
    """Differences at `places` of one shard; a batch that holds several of them is solved once."""
    info = records.read_shard_info(source.folder, teacher.manifest, shard)
    same = info.made_on == teacher.made_on and info.libraries == records.library_versions()
    inputs, problems, latents = teacher.prepare(shard), [], {}
    for place in places:
        first = place // teacher.batch_size * teacher.batch_size
        if first not in latents:
            latents = {first: jax.device_get(teacher.solve(inputs, first))}
        record_id = inputs.ids[place]
        stored = source[record_id]["latents"]
        again = latents[first][place - first].astype(stored.dtype)
        if reason := _difference(stored, again, exactly=same):
            text = f"latents of record {record_id} are not the teacher's solution ({reason})"
            problems.append(records.Problem(info.name, source.offset(record_id), text, shard))
    return problems


def _difference(stored: np.ndarray, again: np.ndarray, *, exactly: bool) -> str | None:
    """What is wrong, or None."""
    if np.array_equal(stored, again):
        return None
    stored, again = stored.astype(np.float32), again.astype(np.float32)
    relative = float(np.sqrt(np.mean((stored - again) ** 2) / max(float(np.mean(stored**2)), 1e-12)))
    if exactly:
        return f"differ by {relative:.2g} of their size, made on the same devices: they should be equal"
    if relative <= TOLERANCE:  # False for NaN
        return None
    return f"differ by {relative:.2g} of their size, at most {TOLERANCE} is allowed"
