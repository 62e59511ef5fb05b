"""A shard's prompts and noise, ready for the devices; and its batches solved, so that no device waits for the host.

Three things happen at once, each in a thread of its own: the next shard is prepared (tokens, noise, text embeddings),
the devices solve the next batch, and the last one is written. None of them changes a number.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from d2g_jax import records
from d2g_jax.diffusion import noise
from d2g_jax.pairs.prompts import Prompts
from d2g_jax.pipeline.conditioning import Conditioning, text_fields, tokenize_prompts
from d2g_jax.pipeline.draw import Programs, Solution, padded, teacher_programs
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.records.schema import LATENT_DTYPES
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.errors import UserError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One shard before it is solved, on the host.

    Attributes:
      shard: its number; ids: its records.
      texts: the prompt of each record.
      input_ids: int32 (N, T L).
      bits: of the noise, uint16 (N, C, h, w).
      text: of the distinct prompts, (D, ...) each.
      rows: int (N,), where in `text` each record's prompt is.
    """

    shard: int
    ids: range
    texts: list[str]
    input_ids: np.ndarray
    bits: np.ndarray
    text: Conditioning
    rows: np.ndarray

    def text_of(self, part: slice | np.ndarray) -> Conditioning:
        """The embeddings of some records."""
        return jax.tree.map(lambda x: x[self.rows[part]], self.text)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Some solved records of one shard, from place `first` on: float32 scaled latents (B, C, h, w)."""

    inputs: Inputs
    first: int
    latents: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
    """A pipeline that solves the records of a manifest, batch by batch, on this process' devices."""

    pipeline: Pipeline
    prompts: Prompts
    manifest: records.Manifest
    solution: Solution
    mesh: jax.sharding.Mesh
    batch_size: int

    @functools.cached_property
    def programs(self) -> Programs:
        """Text towers and UNet on the devices; compiled on first use."""
        return teacher_programs(self.pipeline, self.mesh, self.solution)

    @functools.cached_property
    def _turn(self) -> threading.Lock | None:
        """Simulated CPU devices abort when two programs are under way, so there the threads take turns."""
        return threading.Lock() if jax.default_backend() == "cpu" else None

    @property
    def made_on(self) -> str:
        """On what; together with the library versions it decides the last bits of a latent."""
        devices = self.mesh.devices.ravel()
        return f"{len(devices)} x {devices[0].device_kind}, batches of {self.batch_size}"

    def run(self, program: Callable[..., T], *arguments: Any) -> T:
        """Starts a program; on CPU also waits for it."""
        if self._turn is None:
            return program(*arguments)
        with self._turn:
            return jax.block_until_ready(program(*arguments))

    def prepare(self, shard: int) -> Inputs:
        """Tokens, noise and text embeddings of a shard; each distinct prompt goes through the towers once."""
        m = self.manifest
        ids = records.shard_range(shard, m.num_shards, m.num_records)
        texts = [self.prompts[i] for i in ids]
        places: dict[str, int] = {}  # in the order of the records: without duplicates these are the records' batches
        rows = np.asarray([places.setdefault(text, len(places)) for text in texts])
        tokens = tokenize_prompts(self.pipeline, list(places))
        bits = self.run(noise.record_bits, m.seed, jnp.asarray(ids), m.latent_shape)
        parts = []
        for first in range(0, len(tokens), self.batch_size):
            part = tokens[first : first + self.batch_size]
            placed = meshes.place_batch(padded(part, self.batch_size), self.mesh)
            parts.append(jax.device_get(self.run(self.programs.encode, placed)))
        text = jax.tree.map(lambda *x: np.concatenate(x)[: len(places)], *parts)
        return Inputs(shard, ids, texts, tokens[rows], np.asarray(bits), text, rows)

    def solve(self, inputs: Inputs, first: int) -> jax.Array:
        """Starts the batch of records from place `first` on: latents (batch_size, C, h, w), the last ones padding."""
        part = slice(first, first + self.batch_size)
        drawn = noise.quantiles()[inputs.bits[part]].astype(np.float32)
        host = jax.tree.map(lambda x: padded(x, self.batch_size), (drawn, inputs.text_of(part)))
        return self.run(self.programs.solve, *meshes.place_batch(host, self.mesh))

    def solved(self, shards: Iterable[Inputs]) -> Iterator[Batch]:
        """Every batch of `shards` in order; the next is started before the last is fetched, but where `run` waits."""
        under_way: tuple[Inputs, int, jax.Array] | None = None
        for inputs in shards:
            for first in range(0, len(inputs.ids), self.batch_size):
                latents = self.solve(inputs, first)
                if under_way is not None:
                    yield _fetch(*under_way)
                under_way = inputs, first, latents
                if self._turn is not None:
                    yield _fetch(*under_way)
                    under_way = None
        if under_way is not None:
            yield _fetch(*under_way)

    def batches_of(self, shard: int) -> int:
        """How many batches a shard takes."""
        ids = records.shard_range(shard, self.manifest.num_shards, self.manifest.num_records)
        return -(-len(ids) // self.batch_size)

    def records(self, batch: Batch) -> Iterator[dict[str, Any]]:
        """The records of a batch, as `records.PairSchema` has them."""
        m, inputs = self.manifest, batch.inputs
        dtype = LATENT_DTYPES[m.latent_dtype]
        text = text_fields(inputs.text) if m.text_shapes else {}
        for place, latents in enumerate(batch.latents, batch.first):
            bits = inputs.bits[place]
            yield {
                "id": inputs.ids[place],
                "prompt": inputs.texts[place],
                "input_ids": inputs.input_ids[place],
                "noise_seed": m.seed,
                "noise_hash": noise.bits_hash(bits),
                "latents": latents.astype(dtype),
                **({"noise": noise.quantiles()[bits]} if m.store_noise else {}),
                **{name: value[inputs.rows[place]].astype(dtype) for name, value in text.items()},
            }


def check_batch_size(pairs: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Raises `UserError` unless `pairs.batch_size` divides over the devices."""
    devices = meshes.batch_shards(mesh)
    if pairs.batch_size < 1 or pairs.batch_size % devices:
        raise UserError(f"pairs.batch_size={pairs.batch_size} is no multiple of the {devices} devices; give one")


def _fetch(inputs: Inputs, first: int, latents: jax.Array) -> Batch:
    return Batch(inputs, first, jax.device_get(latents)[: len(inputs.ids) - first])
