"""The loop: steps until `train.images`, with every effect."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_collections
import numpy as np

from d2g_jax import records
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.report import LivePage
from d2g_jax.runtime import buckets
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.interrupt import StopRequests
from d2g_jax.runtime.maintenance import maintenance_notices
from d2g_jax.runtime.processes import Vote, is_first
from d2g_jax.runtime.progress import Progress
from d2g_jax.train.checkpoint import Checkpoints
from d2g_jax.train.gallery import make_gallery
from d2g_jax.train.journal import Journal
from d2g_jax.train.painter import Painter
from d2g_jax.train.programs import compile_programs, iteration
from d2g_jax.train.state import TrainState
from d2g_jax.train.step import Distillation, Frozen

BUCKET_READERS = 8
"""Threads that read where each record waits for a network."""


def loop(
    config: ml_collections.ConfigDict,
    d: Distillation,
    frozen: Frozen,
    state: TrainState,
    source: records.PairSource | records.SkippingSource,
    mesh: jax.sharding.Mesh,
    checkpoints: Checkpoints,
    workdir: Path,
    pipeline: Pipeline,
    page: LivePage,
) -> TrainState:
    """Steps until `train.images`, with every effect: metrics, pictures, checkpoints, a page that is kept fresh.

    SIGINT, SIGTERM and a maintenance notice to any process stop all of them after the same step, saved.
    """
    t, images = config.train, int(state.images)
    total = -(-t.images // t.batch_size) * t.batch_size  # whole batches
    skipped = source.skipped if isinstance(source, records.SkippingSource) else set()
    metadata = {"name": config.name, "pipeline": str(pipeline.folder.absolute()), "timestep": d.timestep}
    metadata["teacher_hash"] = source.manifest.teacher_hash
    painter, vote = Painter(d, frozen, source, mesh, pipeline, workdir), Vote()
    kept = records.held_out(len(source), t.held_out)
    held_out = [source[i] for i in kept]
    batches = read_batches(config, records.Rest(source, kept), mesh, images)
    batches = (meshes.place_batch(batch, mesh) for batch in batches)
    batch = next(batches)
    page.update("compiling", images, at_once=True)
    if is_first():
        print(f"train {config.name}: R on {len(kept)} records of {len(source)}; compiling", file=sys.stderr, flush=True)
    programs = compile_programs(config, d, frozen, state, batch, mesh)
    page.memory["steps"] = programs.memory()
    with (
        StopRequests() as requests,
        maintenance_notices(requests.terminate),
        Progress(f"train {config.name}", total, "img", done=images) as progress,
        Journal(config, workdir, checkpoints, metadata, progress.say) as journal,
    ):
        while images < t.images:
            state, metrics = iteration(config, programs, frozen, state, batch, images)
            images += t.batch_size
            batch = next(batches)
            journal.add(images, metrics)
            if _crosses(images, t.log_every, t):
                counts = {"corrupt_records": len(skipped)} if skipped else {}
                if held_out:
                    counts["unexplained"] = painter.unexplained(state.ema, held_out)
                journal.write_line(images, state, counts)
            if _crosses(images, t.sample_every, t):
                journal.add_picture(images, painter.draw(state.ema, images))
            stop = vote(requests.signal)
            if _crosses(images, t.checkpoint_every, t) or stop:
                journal.save(state)
            progress.advance(t.batch_size)
            if _crosses(images, t.log_every, t):
                page.update("training", images)
            if stop and images < t.images:
                checkpoints.wait()
                requests.leave(stop)
        page.update("drawing the last pictures", images, at_once=True)
        make_gallery(painter, state.ema, source, workdir, images, kept)
        checkpoints.wait()
    if skipped:
        logging.getLogger(__name__).warning(
            "%s: %d corrupt records were skipped; `d2g pairs verify %s --repair` removes their shards",
            source.folder, len(skipped), source.folder,
        )  # fmt: skip
    return state


def _crosses(images: int, every: int, t: ml_collections.ConfigDict) -> bool:
    """Whether the step that ended at `images` passed a multiple of `every`, or ended the run."""
    return images >= t.images or images // every > (images - t.batch_size) // every


def read_batches(
    config: ml_collections.ConfigDict,
    source: records.Rest,
    mesh: jax.sharding.Mesh,
    images: int,
) -> Iterator[dict[str, np.ndarray]]:
    """This process' rows of every global batch from image `images` on."""
    stream = records.dataset(
        source,
        batch_size=config.train.batch_size,
        seed=config.seed,
        start=images,
        rows=meshes.own_rows(mesh, config.train.batch_size),
        num_threads=1 if buckets.is_local(source.folder) else BUCKET_READERS,
    )
    for batch in stream:
        # Record ids enter threefry as 32-bit words.
        yield {**batch, "id": batch["id"].astype(np.uint32)}
