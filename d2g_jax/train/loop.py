"""The loop: steps until `train.images`, with every effect."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_collections
import numpy as np

from d2g_jax import mesh as meshes
from d2g_jax import records, runs
from d2g_jax.checkpoint import Checkpoints
from d2g_jax.errors import UserError
from d2g_jax.interrupt import StopRequests
from d2g_jax.pipeline import Pipeline
from d2g_jax.progress import Progress
from d2g_jax.state import TrainState
from d2g_jax.step import Distillation, Frozen
from d2g_jax.train.painter import Painter
from d2g_jax.train.programs import compile_programs, iteration


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
) -> TrainState:
    """Steps until `train.images`, with every effect: metrics, pictures, checkpoints."""
    t, images = config.train, int(state.images)
    painter = Painter(d, frozen, source, mesh, pipeline, workdir)
    metadata = {"name": config.name, "pipeline": str(pipeline.folder.absolute()), "timestep": d.timestep}
    log = runs.MetricsLog(workdir, config.name, images)
    skipped = source.skipped if isinstance(source, records.SkippingSource) else set()
    batches = (meshes.place_batch(batch, mesh) for batch in read_batches(config, source, images))
    batch = next(batches)
    programs = compile_programs(config, d, frozen, state, batch, mesh)
    try:
        with StopRequests() as requests, Progress(f"train {config.name}", t.images, "img", done=images) as progress:
            while images < t.images:
                state, metrics = iteration(config, programs, frozen, state, batch, images)
                images += t.batch_size
                batch = next(batches)
                log.add(images, metrics | ({"corrupt_records": len(skipped)} if skipped else {}))
                if _crosses(images, t.log_every, t) and (problem := log.write()):
                    checkpoints.save(state, {**metadata, "problem": problem})
                    raise UserError(f"{workdir}: {problem}; lower a learning rate, then run with another --workdir")
                if _crosses(images, t.sample_every, t):
                    painter.draw(state.ema, images)
                if _crosses(images, t.checkpoint_every, t) or requests.stop:
                    checkpoints.save(state, metadata)
                progress.advance(t.batch_size)
                if requests.stop and images < t.images:
                    checkpoints.wait()
                    requests.leave()
        if skipped:
            logging.getLogger(__name__).warning(
                "%s: %d corrupt records were skipped; `d2g pairs verify %s --repair` removes their shards",
                source.folder, len(skipped), source.folder,
            )  # fmt: skip
    finally:
        log.close()
    return state


def _crosses(images: int, every: int, t: ml_collections.ConfigDict) -> bool:
    """Whether the step that ended at `images` passed a multiple of `every`, or ended the run."""
    return images >= t.images or images // every > (images - t.batch_size) // every


def read_batches(
    config: ml_collections.ConfigDict, source: records.PairSource | records.SkippingSource, images: int
) -> Iterator[dict[str, np.ndarray]]:
    """This process' part of every global batch from image `images` on."""
    stream = records.dataset(
        source,
        batch_size=config.train.batch_size,
        seed=config.seed,
        start=images,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    for batch in stream:
        # Record ids enter threefry as 32-bit words.
        yield {**batch, "id": batch["id"].astype(np.uint32)}
