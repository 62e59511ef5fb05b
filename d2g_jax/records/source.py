"""Random access to the records of a folder: any thread, any process, any order, every checksum checked."""

from __future__ import annotations

import bisect
import functools
import logging
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d2g_jax.records.framing import FrameError, scan, unframe
from d2g_jax.records.manifest import Manifest
from d2g_jax.records.shards import read_index, read_shard_info, repair_command, shard_range, write_index
from d2g_jax.runtime import buckets
from d2g_jax.runtime.errors import UserError

_MAX_OPEN_FILES = 64  # per process; a folder may have more shards than a process may have open files


class CorruptRecord(UserError):
    """A record that cannot be read, in a shard that is there."""


class PairSource:
    """The pairs of a folder as a sequence; item i is the record with id i.

    Args:
        folder: `.../pairs/1.0.0`.
        fields: which fields to decode, all by default.

    Items are dicts of arrays as `PairSchema.decode` gives them; tensors are read-only. Safe to share between threads
    and to pickle (to workers). Memory is 8 bytes per record.

    Raises:
        UserError: no folder of pairs, a shard missing or of another size, an unknown field; and, on reading, a corrupt
            record, with its file, byte offset and the command that repairs.
    """

    def __init__(self, folder: str | Path, fields: Sequence[str] | None = None):
        self.folder = buckets.as_path(folder)
        self.manifest = Manifest.read(self.folder)
        self._schema = self.manifest.schema()
        self._fields = tuple(self._schema.names() if fields is None else fields)
        if unknown := [name for name in self._fields if name not in self._schema.names()]:
            raise UserError(f"{folder}: pairs have no field {unknown[0]!r}, only {', '.join(self._schema.names())}")
        self._decoded = tuple(dict.fromkeys(("id", *self._fields)))
        total, count = self.manifest.num_shards, self.manifest.num_records
        infos = [read_shard_info(self.folder, self.manifest, shard) for shard in range(total)]
        self._paths = [self.folder / info.name for info in infos]
        self._firsts = [shard_range(shard, total, count).start for shard in range(total)]
        self._offsets: list[np.ndarray | None] = [None] * total  # indexes are loaded when first needed
        self._descriptor = functools.lru_cache(_MAX_OPEN_FILES)(_Descriptor)

    def __len__(self) -> int:
        return self.manifest.num_records

    def __repr__(self) -> str:
        return f"PairSource({str(self.folder)!r}, {len(self)} records)"

    def __getitem__(self, record_id: int) -> dict[str, np.ndarray]:
        if not 0 <= record_id < len(self):
            raise IndexError(f"record {record_id} of {len(self)}")
        path, start, end = self._place(record_id)
        try:
            record = self._schema.decode(unframe(self._read(path, start, end - start)), self._decoded)
            if record["id"] != record_id:
                raise ValueError(f"holds id {record['id']} where {record_id} belongs")
        except ValueError as error:
            raise CorruptRecord(_corrupt(path, start, error)) from error
        except OSError as error:  # a disk or a network that fails now: not the record's fault, and never skipped
            raise UserError(_corrupt(path, start, error)) from error
        return {name: record[name] for name in self._fields}

    def offset(self, record_id: int) -> int:
        """Where in its shard a record starts, in bytes."""
        return self._place(record_id)[1]

    def _place(self, record_id: int) -> tuple[Path, int, int]:
        """A record's shard, and the bytes from where to where."""
        shard = bisect.bisect_right(self._firsts, record_id) - 1  # numpy's takes ten times as long for one number
        place, offsets = record_id - self._firsts[shard], self._index(shard)
        return self._paths[shard], int(offsets[place]), int(offsets[place + 1])

    def _read(self, path: Path | buckets.BucketPath, offset: int, size: int) -> bytes:
        if not buckets.is_local(path):
            return path.read_range(offset, size)
        file = self._descriptor(path)  # a name of its own: it must not close while it is read
        return os.pread(file.number, size, offset)

    def _index(self, shard: int) -> np.ndarray:
        if self._offsets[shard] is None:
            first, path = shard_range(shard, self.manifest.num_shards, self.manifest.num_records), self._paths[shard]
            self._offsets[shard] = _load_index(path, len(first))
        return self._offsets[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": None}  # descriptors stay in their process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _descriptor=functools.lru_cache(_MAX_OPEN_FILES)(_Descriptor))


class SkippingSource:
    """A `PairSource` in which the next readable record stands for a corrupt one; `skipped` are the ids left out.

    Records of `held_out` stand for one another alone, so that none of them is trained on. The first skip is a warning
    in the log. Raises the record's own error when no record can be read, and still when a shard is missing or none of
    its records can be found.
    """

    def __init__(self, source: PairSource, held_out: Collection[int] = ()):
        self._source, self.held_out = source, frozenset(held_out)
        self.manifest, self.folder = source.manifest, source.folder
        self.skipped: set[int] = set()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, record_id: int) -> dict[str, np.ndarray]:
        for other in (i % len(self) for i in range(record_id, record_id + len(self))):
            if (other in self.held_out) != (record_id in self.held_out):
                continue
            try:
                return self._source[other]
            except CorruptRecord as error:
                corrupt = error
                if not self.skipped:
                    logging.getLogger(__name__).warning("skipped: %s", error)
                self.skipped.add(other)
        raise corrupt


class Rest:
    """All records of a source but `left_out`, in order: what is read of pairs of which some are kept for measuring."""

    def __init__(self, source: PairSource | SkippingSource, left_out: Sequence[int]):
        self._source = source
        self._before = np.asarray(left_out, np.int64) - np.arange(len(left_out))  # records of ours before each

    def __len__(self) -> int:
        return len(self._source) - len(self._before)

    @property
    def folder(self) -> Path | buckets.BucketPath:
        return self._source.folder

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._source[index + int(np.searchsorted(self._before, index, side="right"))]


def held_out(count: int, wanted: int) -> list[int]:
    """Ids of about `wanted` of `count` records, at most a tenth of them, evenly spread and always the same."""
    kept = min(wanted, count // 10)
    return [(2 * i + 1) * count // (2 * kept) for i in range(kept)]


class _Descriptor:
    """An open file; closes when it is given up and its last reader is done."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "number"):  # absent when the file could not be opened
            os.close(self.number)


def _load_index(path: Path, count: int) -> np.ndarray:
    """The shard's index; made from the shard itself, and written, when it is absent or belongs to another file."""
    kept, size = read_index(path), buckets.size(path)
    if kept is not None and kept.dtype == np.int64 and kept.shape == (count + 1,) and kept[-1] == size:
        return kept
    try:
        offsets = scan(path)
    except FrameError as error:
        raise UserError(_corrupt(path, error.offset, error)) from error
    if len(offsets) != count + 1:
        raise UserError(_corrupt(path, int(offsets[-1]), f"{len(offsets) - 1} records, expected {count}"))
    try:
        write_index(path, offsets)
    except UserError as error:  # a read-only folder or a full disk reads all the same, only scans each time
        logging.getLogger(__name__).warning("index not kept: %s", error)
    return offsets


def _corrupt(path: Path, offset: int, reason: Any) -> str:
    return f"{path}: corrupt record at byte {offset} ({reason}); run {repair_command(path.parent)}, then `d2g pairs`"
