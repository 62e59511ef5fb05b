"""Re-reads everything and names what is wrong; repair removes just the bad shards, so that a rerun remakes them."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import jax
import numpy as np

from d2g_jax.diffusion import noise
from d2g_jax.records.framing import FrameError, scan, unframe
from d2g_jax.records.manifest import Manifest
from d2g_jax.records.shards import (
    INDEX,
    ForeignShard,
    ShardInfo,
    index_path,
    info_path,
    read_index,
    read_shard_info,
    shard_name,
    shard_range,
)
from d2g_jax.runtime import buckets
from d2g_jax.runtime.atomic import TEMPORARY
from d2g_jax.runtime.errors import UserError

_REDRAWN = 128  # records whose noise is drawn in one call
_LEFTOVER_SECONDS = 3600  # a temporary file that nobody wrote to for so long belongs to a dead process

_draw_bits = jax.jit(noise.record_bits, static_argnames="shape")


class _Record(NamedTuple):
    place: int  # in the shard
    offset: int
    fields: dict[str, np.ndarray]


@dataclass(frozen=True)
class Problem:
    """Something wrong in a folder of pairs."""

    file: str
    offset: int  # bytes into the file; 0 when it is the file as a whole
    reason: str
    shard: int | None  # None when no shard is bad: `repair` leaves it, unless it is about an index

    def __str__(self) -> str:
        return f"{self.file}: byte {self.offset}: {self.reason}"


def verify(folder: str | Path) -> list[Problem]:
    """Checks every byte of a folder; an empty list means that all is well. `verify_shard` says what is checked.

    Raises `UserError` when the folder has no readable manifest.
    """
    folder = buckets.as_path(folder)
    manifest = Manifest.read(folder)
    problems = []
    for name in ("features.json", "dataset_info.json"):
        if not (folder / name).is_file():
            problems.append(Problem(name, 0, "missing; run `d2g pairs` again", None))
    for shard in range(manifest.num_shards):
        problems += verify_shard(folder, manifest, shard)
    return problems


def verify_shard(folder: Path, manifest: Manifest, shard: int) -> list[Problem]:
    """Size, CRC of the file and of every record, count, shapes, finite values, ids, seeds, hashes and index of a shard.

    Every record's noise is drawn anew and its hash compared (and, if stored, the noise itself).
    """
    path = buckets.as_path(folder) / shard_name(shard, manifest.num_shards)
    ids = shard_range(shard, manifest.num_shards, manifest.num_records)
    try:
        info = read_shard_info(folder, manifest, shard)
    except ForeignShard as error:
        return [Problem(path.name, 0, str(error), None)]
    except UserError as error:
        broken = _read_all(path, manifest, shard)[-1] if path.is_file() else []
        return [Problem(path.name, 0, str(error).removeprefix(f"{path}: "), shard), *broken]
    records, crc, problems = _read_all(path, manifest, shard)
    if not problems:
        problems += _problems_beside(path, info, ids, shard, records, crc)
    for record in records:
        if reason := _wrong(record, ids, manifest):
            problems.append(Problem(path.name, record.offset, reason, shard))
    for start in range(0, len(records), _REDRAWN):
        problems += _noise_problems(path, manifest, shard, records[start : start + _REDRAWN])
    return problems


def repair(folder: str | Path, problems: list[Problem]) -> list[Path]:
    """Removes the shards that `problems` name, with JSON and index, and what dead writers left; returns the files.

    `d2g pairs` then makes just these shards anew. Shards of another run stay: they may be somebody's only copy. Of a
    good shard with a wrong index only the index goes: readers make it anew.
    """
    folder = buckets.as_path(folder)
    manifest = Manifest.read(folder)
    bad = sorted({problem.shard for problem in problems if problem.shard is not None})
    doomed = [folder / problem.file for problem in problems if problem.file.endswith(INDEX)]
    for shard in bad:
        path = folder / shard_name(shard, manifest.num_shards)
        doomed += [info_path(path), index_path(path), path]  # the JSON first: without it the shard is not done
    if buckets.is_local(folder):  # in a bucket nobody leaves half a file
        old = time.time() - _LEFTOVER_SECONDS
        doomed += [path for path in folder.glob(f".*{TEMPORARY}") if path.stat().st_mtime < old]
    removed = [path for path in dict.fromkeys(doomed) if path.exists()]
    for path in removed:
        path.unlink()
    return removed


def _read_all(path: Path, manifest: Manifest, shard: int) -> tuple[list[_Record], int, list[Problem]]:
    """Every readable record, the file's CRC32C, and a problem for every other record."""
    try:
        offsets = scan(path)
    except FrameError as error:
        return [], 0, [Problem(path.name, error.offset, str(error), shard)]
    schema, records, crc, problems = manifest.schema(), [], 0, []
    with path.open("rb") as file:
        for place, (start, size) in enumerate(zip(offsets[:-1].tolist(), np.diff(offsets).tolist(), strict=True)):
            framed = file.read(size)
            crc = google_crc32c.extend(crc, framed)
            try:
                records.append(_Record(place, start, schema.decode(unframe(framed))))
            except ValueError as error:
                problems.append(Problem(path.name, start, str(error), shard))
    return records, crc, problems


def _problems_beside(
    path: Path, info: ShardInfo, ids: range, shard: int, records: list[_Record], crc: int
) -> list[Problem]:
    """What the JSON and the index say against what the file holds, for a file whose records can all be read."""
    hashes = np.asarray([record.fields["noise_hash"] for record in records], "<i8")
    found = {"count": len(records), "crc32c": crc, "first_id": ids[0], "last_id": ids[-1]}
    found |= {"noise_digest": hashlib.sha256(hashes.tobytes()).hexdigest()}
    problems = [
        Problem(info_path(path).name, 0, f"{name} is {getattr(info, name)}, the shard has {value}", shard)
        for name, value in found.items()
        if getattr(info, name) != value
    ]
    if len(records) != len(ids):
        problems.append(Problem(path.name, 0, f"{len(records)} records, expected {len(ids)}", shard))
    kept, offsets = read_index(path), [*(record.offset for record in records), info.bytes]
    if kept is not None and (kept.dtype != np.int64 or not np.array_equal(kept, offsets)):
        problems.append(Problem(index_path(path).name, 0, "not where the records of the shard start", None))
    return problems


def _wrong(record: _Record, ids: range, manifest: Manifest) -> str | None:
    fields, expected = record.fields, ids.start + record.place
    if fields["id"] != expected or expected not in ids:
        return f"id {fields['id']} at place {record.place} of {ids}"
    if fields["noise_seed"] != manifest.seed:
        return f"noise_seed is {fields['noise_seed']}, the manifest has {manifest.seed}"
    for name in manifest.schema().floats():
        if not np.isfinite(fields[name].astype(np.float32)).all():
            return f"{name} of record {fields['id']} are not finite"
    return None


def _noise_problems(path: Path, manifest: Manifest, shard: int, records: list[_Record]) -> list[Problem]:
    ids = np.zeros(_REDRAWN, np.uint32)  # always the same size: one compilation
    ids[: len(records)] = [record.fields["id"] & 0xFFFFFFFF for record in records]
    drawn = np.asarray(_draw_bits(manifest.seed, ids, shape=manifest.latent_shape))  # (B, C, h, w)
    problems = []
    for record, bits in zip(records, drawn[: len(records)], strict=True):
        fields = record.fields
        if noise.bits_hash(bits) != fields["noise_hash"]:
            reason = f"noise of record {fields['id']} has another hash than the noise drawn anew"
        elif "noise" in fields and not np.array_equal(fields["noise"], noise.quantiles()[bits]):
            reason = f"noise of record {fields['id']} is not the noise drawn anew"
        else:
            continue
        problems.append(Problem(path.name, record.offset, reason, shard))
    return problems
