"""Records computed once and kept on disk: one structured .npy file per shard, and a JSON of what made them.

Whole shards or none: a run that was stopped makes the missing ones. A folder that something else made is refused.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from d2g_jax.inputs.text import read_json
from d2g_jax.runtime import atomic
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.progress import Progress

MADE_FROM = "made_from.json"


@dataclasses.dataclass(frozen=True)
class Shards:
    """A structured array (N,) spread over mapped files of `per_shard` records each; the last one may be shorter."""

    parts: tuple[np.ndarray, ...]
    per_shard: int

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The records `rows` (B,), in memory."""
        shards, places = np.divmod(rows, self.per_shard)
        taken = np.empty(len(rows), self.parts[0].dtype)
        for shard in np.unique(shards):
            here = shards == shard
            taken[here] = self.parts[shard][places[here]]
        return taken


def build(
    folder: Path,
    made_from: dict[str, Any],
    count: int,
    per_shard: int,
    make: Callable[[range], np.ndarray],
    *,
    label: str,
) -> Shards:
    """Makes the shards that `folder` lacks by `make(rows)`, which gives a structured array with one record per row.

    Raises `UserError` when the folder was made from something else (`made_from` is compared key by key).
    """
    made_from = {**made_from, "count": count, "per_shard": per_shard}
    file = folder / MADE_FROM
    if file.exists():
        check(folder, made_from)
    else:
        atomic.write_json(file, made_from)
    starts = range(0, count, per_shard)
    missing = [start for start in starts if not _path(folder, start // per_shard, len(starts)).exists()]
    lacking = sum(min(per_shard, count - start) for start in missing)
    if missing:
        with Progress(label, count, "rec", done=count - lacking) as progress:
            for start in missing:
                rows = range(start, min(start + per_shard, count))
                atomic.write_array(_path(folder, start // per_shard, len(starts)), make(rows))
                progress.advance(len(rows))
    return open_shards(folder)


def open_shards(folder: Path) -> Shards:
    """The finished shards of a folder; raises `UserError` when one is missing or damaged."""
    described = read_made_from(folder)
    total, parts = -(-described["count"] // described["per_shard"]), []
    for shard in range(total):
        path = _path(folder, shard, total)
        try:
            parts.append(np.load(path, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"{path}: cannot be read ({error}); remove it and run again with what it is made from"
            ) from error
    return Shards(tuple(parts), described["per_shard"])


def read_made_from(folder: Path) -> dict[str, Any]:
    """What a folder was made from; raises `UserError` when it is not one of ours."""
    return read_json(folder / MADE_FROM, "give a folder that `d2g lpips` has filled")


def check(folder: Path, expected: dict[str, Any]) -> None:
    """Raises `UserError` that names the first key of `expected` of which the folder has another value."""
    described = read_made_from(folder)
    for key, value in expected.items():
        there = described.get(key)
        if there != json.loads(json.dumps(value)):  # tuples come back as lists
            raise UserError(
                f"{folder / MADE_FROM}: made with {key}={_short(there)}, this run has {_short(value)}; "
                "give another folder or remove this one"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _path(folder: Path, shard: int, total: int) -> Path:
    return folder / f"records-{shard:05d}-of-{total:05d}.npy"
