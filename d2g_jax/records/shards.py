"""Shards: a fixed id range each, written once under a temporary name, done when the JSON beside it is there."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d2g_jax.inputs.arrays import DAMAGED
from d2g_jax.records.files import read_json, write_atomic, write_json
from d2g_jax.records.framing import frame
from d2g_jax.records.manifest import Manifest
from d2g_jax.records.schema import DATASET, SPLIT, PairSchema
from d2g_jax.runtime import atomic, buckets
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.version import __version__

INDEX = ".index.npy"
"""Ends the name of a shard's index."""


class ForeignShard(UserError):
    """A shard that another run made: nothing is wrong with it, it only does not belong here."""


@dataclass(frozen=True)
class ShardInfo:
    """One shard's entry in the manifest: the JSON file beside it."""

    name: str
    count: int
    bytes: int
    crc32c: int  # of the whole file
    first_id: int
    last_id: int
    noise_digest: str  # SHA-256 of the records' noise hashes, int64 little-endian, in order
    config_hash: str
    made_on: str  # devices and batch size; with `libraries`, what decides whether latents come out equal to the bit
    libraries: dict[str, str]


def shard_name(shard: int, num_shards: int) -> str:
    """TFDS's file name of a shard: `pairs-train.tfrecord-00000-of-00010`."""
    return f"{DATASET}-{SPLIT}.tfrecord-{shard:05d}-of-{num_shards:05d}"


def shard_range(shard: int, num_shards: int, num_records: int) -> range:
    """The record ids of a shard: consecutive, and as even as can be."""
    return range(shard * num_records // num_shards, (shard + 1) * num_records // num_shards)


def info_path(shard_path: Path) -> Path:
    """The JSON file of a shard."""
    return shard_path.with_name(shard_path.name + ".json")


def index_path(shard_path: Path) -> Path:
    """The index file of a shard: int64 (count + 1,), where records start and where the last one ends."""
    return shard_path.with_name(shard_path.name + INDEX)


def write_shard(
    folder: Path, manifest: Manifest, shard: int, records: Iterable[Mapping[str, Any]], made_on: str = ""
) -> ShardInfo:
    """Writes a shard, its index and last its JSON, each atomically; the same records give the same bytes.

    Args:
        folder: holds the manifest already (`Manifest.write`).
        records: the records of `shard_range(...)` in order, fields as `PairSchema` says; consumed one by one, so a
            generator overlaps with the disk. If it raises, nothing stays.
        made_on: devices and batch size, for people and for comparisons.

    Raises:
        UserError: the disk is full, the folder is read-only, or latents or text embeddings are not finite.
        ValueError: a record that does not belong in this shard.
    """
    path = buckets.as_path(folder) / shard_name(shard, manifest.num_shards)
    ids = shard_range(shard, manifest.num_shards, manifest.num_records)
    offsets, digest = [0], hashlib.sha256()
    size, crc = write_atomic(path, _frames(path, manifest.schema(), manifest.seed, ids, records, offsets, digest))
    write_index(path, np.asarray(offsets, np.int64))
    info = ShardInfo(
        name=path.name,
        count=len(ids),
        bytes=size,
        crc32c=crc,
        first_id=ids[0],
        last_id=ids[-1],
        noise_digest=digest.hexdigest(),
        config_hash=manifest.config_hash,
        made_on=made_on,
        libraries=library_versions(),
    )
    write_json(info_path(path), info)
    return info


def write_index(shard_path: Path, offsets: np.ndarray) -> None:
    """Writes the index of a shard atomically."""
    atomic.write_array(index_path(shard_path), offsets)


def read_index(shard_path: Path) -> np.ndarray | None:
    """What the index file of a shard holds; None where there is none, or no array: the shard itself knows better."""
    try:
        return np.load(io.BytesIO(index_path(shard_path).read_bytes()), allow_pickle=False)
    except DAMAGED:
        return None


def read_shard_info(folder: Path, manifest: Manifest, shard: int) -> ShardInfo:
    """The entry of a shard.

    Raises `UserError` when the shard is not done (no JSON, no file, or another size), and of these `ForeignShard` when
    it is another run's.
    """
    path = buckets.as_path(folder) / shard_name(shard, manifest.num_shards)
    if not info_path(path).is_file() or not path.is_file():
        raise UserError(f"{path}: shard is missing; run `d2g pairs` again, it makes only what is missing")
    info = _read_info(path, manifest)
    if buckets.size(path) != info.bytes:
        raise UserError(
            f"{path}: {buckets.size(path)} bytes, written with {info.bytes}; run {repair_command(folder)}, "
            "then `d2g pairs` again"
        )
    return info


def missing_shards(folder: Path, manifest: Manifest) -> list[int]:
    """The shards still to be made: those without a JSON beside them, or with a file that is gone or of another size.

    Raises `UserError` on a JSON that cannot be read or that another config wrote: such a folder is not touched.
    """
    return [shard for shard in range(manifest.num_shards) if not is_whole(folder, manifest, shard)]


def is_whole(folder: Path, manifest: Manifest, shard: int) -> bool:
    """Whether a shard need not be made; raises as `missing_shards` does."""
    path = buckets.as_path(folder) / shard_name(shard, manifest.num_shards)
    if not info_path(path).exists():
        return False
    info = _read_info(path, manifest)
    return path.is_file() and buckets.size(path) == info.bytes


def _read_info(path: Path, manifest: Manifest) -> ShardInfo:
    info = read_json(info_path(path), ShardInfo)
    if info.config_hash != manifest.config_hash or info.name != path.name:
        raise ForeignShard(
            f"{info_path(path)}: entry of {info.name} of config {info.config_hash[:12]}, the manifest has "
            f"{manifest.config_hash[:12]}; put the folder's own manifest back or choose another folder"
        )
    return info


def repair_command(folder: Path) -> str:
    """What a user runs when a shard is broken."""
    return f"`d2g pairs verify {folder} --repair`"


def _frames(
    path: Path,
    schema: PairSchema,
    seed: int,
    ids: range,
    records: Iterable[Mapping[str, Any]],
    offsets: list[int],
    digest: hashlib._Hash,
) -> Iterator[bytes]:
    """Checked and framed records; fills `offsets` and `digest` on the way."""
    count, checked = 0, schema.floats()
    for record in records:
        if count == len(ids) or record["id"] != ids[count] or record["noise_seed"] != seed:
            raise ValueError(f"{path.name} holds ids {ids} of seed {seed}, got id {record['id']} at place {count}")
        for name in checked:
            if not np.isfinite(np.asarray(record[name], np.float32)).all():
                raise UserError(
                    f"{path}: {name} of record {record['id']} are not finite; solve in bfloat16 or float32, "
                    "or set pairs.latent_dtype=bfloat16"
                )
        data = frame(schema.encode(record))
        digest.update(int(record["noise_hash"]).to_bytes(8, "little", signed=True))
        offsets.append(offsets[-1] + len(data))
        count += 1
        yield data
    if count != len(ids):
        raise ValueError(f"{path.name} needs {len(ids)} records, got {count}")


def library_versions() -> dict[str, str]:
    """What a shard is made with."""
    libraries = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy", "tensorflow-datasets")}
    return {"d2g_jax": __version__, **libraries}
