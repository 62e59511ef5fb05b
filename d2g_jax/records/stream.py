"""Records as an endless stream of shuffled batches whose place is one number: images so far, over all processes."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import grain

_READ_AHEAD = 4  # batches
_ROUNDS = 4
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def dataset(
    source: Sequence[dict[str, np.ndarray]],
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    rows: np.ndarray | None = None,
    num_threads: int = 1,
) -> grain.IterDataset:
    """Endless batches of `source`, read ahead by grain's threads.

    Image p of the run is record `record_index(seed, p, len(source))`: every epoch holds each record once in an order
    of its own, and a batch may span two epochs, so none is dropped. The n-th item holds this process's `rows` of the
    images start + n * batch_size, ..., so a run stopped at image N goes on with `start=N`, on any mesh and any number
    of processes, with the same global batches.

    Args:
        source: items as dicts of arrays, such as `PairSource`.
        batch_size: images per step over all processes.
        start: images that the run has consumed already.
        rows: of every batch that this process reads (`mesh.own_rows`), from 0 to batch_size - 1; None for all.
        num_threads: that read and decode; 0 reads in the calling thread. Decoding is Python, so that more than one are
            slower, but where they wait for a network.

    Returns:
        `grain.IterDataset` of dicts of arrays with leading dimension len(rows).
    """
    import grain  # two seconds of import that only the readers need

    rows = np.arange(batch_size) if rows is None else np.asarray(rows, np.int64)
    batches = _Batches(source, seed, start, batch_size, rows)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(_READ_AHEAD, num_threads))
    return grain.MapDataset.source(batches).to_iter_dataset(options)


def record_index(seed: int, positions: np.ndarray, count: int) -> np.ndarray:
    """Which record each image of a run is: int64 like `positions`, a pure function of (seed, position, count).

    Epoch = position // count; inside it a keyed Feistel network permutes the cells of a grid of about sqrt(count) rows
    and columns, and walks on from the few cells past `count` (Black and Rogaway, "Ciphers with Arbitrary Finite
    Domains", 2002). It needs no memory, starts anywhere at once, and unlike a library's shuffle never changes with the
    library.
    """
    positions = np.asarray(positions, np.int64)
    epochs, places = np.divmod(positions, count)
    keys = _mix(_mix(np.full(positions.shape, seed & (2**64 - 1), np.uint64) + _GOLDEN) + epochs.astype(np.uint64))
    columns = math.isqrt(count - 1) + 1
    grid = np.uint64(-(-count // columns)), np.uint64(columns)
    index = _feistel(places.astype(np.uint64), keys, *grid)
    while (outside := index >= count).any():
        index[outside] = _feistel(index[outside], keys[outside], *grid)
    return index.astype(np.int64)


@dataclass(frozen=True)
class _Batches:
    """This process' rows of batch n of a run, for every n."""

    source: Sequence[dict[str, np.ndarray]]
    seed: int
    start: int  # position of the first image of batch 0
    size: int
    rows: np.ndarray

    def __len__(self) -> int:
        return (sys.maxsize - self.start) // self.size

    def __getitem__(self, number: Any) -> dict[str, np.ndarray]:
        positions = self.start + int(number) * self.size + self.rows
        ids = record_index(self.seed, positions, len(self.source))
        return _stacked((self.source[record_id] for record_id in ids.tolist()), len(ids))


def _stacked(records: Iterable[dict[str, np.ndarray]], count: int) -> dict[str, np.ndarray]:
    """As `np.stack` of each field of `count` records, which have the same fields, shapes and dtypes.

    A record is let go as soon as it is copied. Kept until the batch is whole, records of 33 KB have the allocator give
    pages back to the system and fetch them again with every batch, which takes longer than reading them.
    """
    batch: dict[str, Any] = {}
    for row, record in enumerate(records):
        for name, value in record.items():
            if not row:  # texts have lengths of their own
                text = value.dtype.kind == "U"
                batch[name] = [None] * count if text else np.empty((count, *value.shape), value.dtype)
            batch[name][row] = value
    return {name: np.asarray(values) for name, values in batch.items()}


def _feistel(cells: np.ndarray, keys: np.ndarray, rows: np.uint64, columns: np.uint64) -> np.ndarray:
    """A keyed permutation of the integers below rows * columns, elementwise; all uint64.

    Each round shifts the row by a hash of the column and then the column by a hash of the row: both can be undone.
    """
    row, column = np.divmod(cells, columns)
    for _ in range(_ROUNDS):
        keys = keys + _GOLDEN
        row = (row + _mix(column ^ keys) % rows) % rows
        column = (column + _mix(row ^ ~keys) % columns) % columns
    return row * columns + column


def _mix(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 in which every bit depends on every other (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
