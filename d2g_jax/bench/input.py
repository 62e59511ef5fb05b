"""`d2g bench input`: how fast pairs are read, shuffled and batched, side by side with TensorFlow's own input pipeline.

In one run and in turns: our reader (random access, a global shuffle, checksums checked) and `tf.data` through TFDS on
the same folder (shards shuffled, a shuffle buffer, parallel decoding), each handing over batches of numpy arrays. A
call reads one epoch from a fresh start, so neither side reads ahead while the other one is timed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from d2g_jax import records
from d2g_jax.bench.measure import Bar, Candidate, check_counts, make_report, ratio, time_in_turns
from d2g_jax.diffusion import noise
from d2g_jax.runtime.errors import UserError

CONSUMPTION = {"digits": 190.0, "sd15": 27.0}
"""Images per second that training takes: on two CPU cores the fastest student of the digits before 28 November 2026
(32x32 pixels), and SD 1.5 at 40% of an H100's peak (planned, not measured)."""

SHAPES = {"digits": ((4, 16, 16), 20), "sd15": ((4, 64, 64), 77)}
"""Latents (C, h, w) and tokens of a record."""

_SHUFFLE_BUFFER = 1024  # records, of tf.data


@dataclasses.dataclass(frozen=True)
class Request:
    """What `d2g bench input` is asked for.

    Attributes:
      pairs: a folder of pairs; None makes one of random records in a temporary folder.
      shape: of those, one of `SHAPES`; it also says what training consumes.
      records: how many.
      batch: records in a batch.
      repeats: rounds of turns.
    """

    pairs: Path | None = None
    shape: str = "sd15"
    records: int = 4096
    batch: int = 64
    repeats: int = 5

    def check(self) -> None:
        """Raises `UserError` that names the flag."""
        if self.shape not in SHAPES:
            raise UserError(f"--shape={self.shape} is unknown; choose one of {', '.join(SHAPES)}")
        check_counts(self, "records", "batch", "repeats")


def run(request: Request) -> dict[str, Any]:
    """Measures and returns the report; `value` of a row is records per second.

    Raises `UserError` for a bad request and a folder without pairs.
    """
    request.check()
    with tempfile.TemporaryDirectory(prefix="d2g_bench_") as temporary:
        folder = Path(request.pairs) if request.pairs else make_folder(Path(temporary), request)
        source = records.PairSource(folder)
        if len(source) < request.batch:
            raise UserError(f"--batch={request.batch}: {folder} has {len(source)} records; give fewer")
        batches = len(source) // request.batch
        candidates = [_ours(source, request.batch, batches), _tensorflow(folder, request.batch, batches)]
        rows = time_in_turns(candidates, request.repeats)
    taken = request.batch * batches
    for row in rows:
        row["value"] = taken / row["seconds"] if row["seconds"] else None
    ours, theirs = (row["value"] for row in rows)
    consumed = CONSUMPTION[request.shape]
    bars = [
        Bar.at_least("ours reads at least 2 times as fast as tf.data through TFDS", ratio(ours, theirs), 2.0),
        Bar.at_least(
            f"and at least 10 times what training consumes ({consumed:g} images/s, {request.shape})",
            ratio(ours, consumed),
            10.0,
        ),
    ]
    settings = {**dataclasses.asdict(request), "pairs": str(request.pairs) if request.pairs else None}
    return make_report("input", settings, rows, bars)


def make_folder(folder: Path, request: Request) -> Path:
    """Random records of the shape asked for, in ten shards or fewer."""
    shape, tokens = SHAPES[request.shape]
    settings = {"shape": shape, "count": request.records}
    manifest = records.Manifest(
        teacher="none",
        teacher_hash="0" * 64,
        solver="ddim",
        num_inference_steps=50,
        guidance_scale=3.0,
        prediction_type="epsilon",
        first_timestep=981,
        scheduler={},
        noise_implementation=noise.IMPLEMENTATION,
        seed=0,
        scaling_factor=1.0,
        latent_shape=shape,
        token_length=tokens,
        latent_dtype="float16",
        store_noise=False,
        text_shapes={},
        num_prompts=1,
        num_distinct_prompts=1,
        num_records=request.records,
        num_shards=min(10, request.records),
        config_hash=records.config_hash(settings),
    )
    manifest.write(folder)
    rng = np.random.default_rng(0)
    for shard in range(manifest.num_shards):
        ids = records.shard_range(shard, manifest.num_shards, manifest.num_records)
        records.write_shard(folder, manifest, shard, (_record(i, shape, tokens, rng) for i in ids))
    records.write_metadata(folder, manifest)
    return folder


def _record(record_id: int, shape: tuple[int, ...], tokens: int, rng: np.random.Generator) -> dict[str, Any]:
    return {
        "id": record_id,
        "prompt": "a prompt of about as many letters as people write in a line of text",
        "input_ids": rng.integers(0, 49408, tokens, dtype=np.int32),
        "noise_seed": 0,
        "noise_hash": record_id,
        "latents": rng.standard_normal(shape, np.float32).astype(np.float16),
    }


def _ours(source: records.PairSource, batch: int, batches: int) -> Candidate:
    fresh = lambda: iter(records.dataset(source, batch_size=batch, seed=0))  # noqa: E731
    return Candidate("d2g_jax", "-", _epoch(fresh, batch, batches))


def _tensorflow(folder: Path, batch: int, batches: int) -> Candidate:
    """As the TFDS performance guide advises, with memory bounded."""
    name = "tf.data through TFDS"
    if importlib.util.find_spec("tensorflow") is None:
        return Candidate(name, "-", None, not_run="tensorflow is not installed")
    import tensorflow as tf
    import tensorflow_datasets as tfds

    config = tfds.ReadConfig(interleave_cycle_length=16, shuffle_seed=0, try_autocache=False)
    data = tfds.builder_from_directory(str(folder)).as_dataset(split="train", shuffle_files=True, read_config=config)
    data = data.shuffle(_SHUFFLE_BUFFER, seed=0).batch(batch, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
    return Candidate(name, "-", _epoch(data.as_numpy_iterator, batch, batches))


def _epoch(fresh: Callable[[], Iterator[dict[str, np.ndarray]]], batch: int, batches: int) -> Callable[[], None]:
    def read() -> None:
        stream = fresh()
        for _ in range(batches):
            found = len(next(stream)["latents"])
            if found != batch:
                raise UserError(f"a batch of {found} in place of {batch}")

    return read
