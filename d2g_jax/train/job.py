"""The distillation job, in the order in which things happen.

Read the config, the teacher, the pairs; build networks, losses, optimisers; take up the newest checkpoint or start from
the teacher; then step, log, draw, save until `train.images` images have been seen.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import ml_collections

from d2g_jax import records
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.report import LivePage, finish
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime import runs
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.interrupt import leaving_at_once
from d2g_jax.runtime.lock import locked
from d2g_jax.runtime.processes import first_decides
from d2g_jax.train import guard
from d2g_jax.train.checkpoint import Checkpoints
from d2g_jax.train.gallery import is_drawn, make_gallery
from d2g_jax.train.loop import loop
from d2g_jax.train.painter import Painter
from d2g_jax.train.setup import TOWERS, build, check_mismatches, check_pairs, initial_state, open_pairs
from d2g_jax.train.state import TrainState
from d2g_jax.train.trackers import check_trackers


def train(config: ml_collections.ConfigDict, workdir: Path, pairs_folder: Path) -> None:
    """Trains until `config.train.images`; the same call goes on where an earlier one stopped.

    Args:
      config: see `d2g_jax/config/base_config.py` for every field.
      workdir: local; gets `checkpoints/`, `metrics.jsonl`, `samples/`, `report.html`, `status.json`, `config.json`.
      pairs_folder: a finished `pairs/1.0.0`.

    Raises:
      UserError: bad config, pairs that do not fit the teacher, a workdir of another config or in use, a loss that is
        not finite.
      KeyboardInterrupt, Terminated: SIGINT or SIGTERM came; the step under way has been finished and saved.
    """
    with leaving_at_once(), ExitStack() as opened:
        mesh, t = meshes.make_mesh(config.mesh.data, config.mesh.fsdp), config.train
        meshes.check_batch(mesh, t.batch_size, t.groups, t.micro_batch, t.r1_micro_batch)
        check_mismatches(config)
        check_trackers(t)
        source = open_pairs(config, pairs_folder)
        first_decides(lambda: opened.enter_context(locked(workdir)))
        if is_finished(config, workdir, source):  # another student of the demo, say: nothing is loaded for it
            first_decides(lambda: finish(workdir, t.images, "images"))
            return
        without = TOWERS if source.manifest.text_shapes else ()
        pipeline = Pipeline.load(config.pipeline, mesh=mesh, without=without)
        check_pairs(pairs_folder, source.manifest, pipeline)
        d, frozen = build(config, pipeline, source.manifest)
        state, frozen = initial_state(config, d, pipeline, mesh), meshes.place(frozen, mesh)  # refuses ranks too
        first_decides(lambda: runs.claim(workdir, config))
        del pipeline.params["unet"]  # in the state, or frozen in half the bytes: nobody else is to hold it
        checkpoints = Checkpoints(workdir / "checkpoints", t.keep_checkpoints, t.keep_best)
        opened.enter_context(checkpoints)
        if checkpoints.latest() is not None:
            state = take_up(config, checkpoints, state)
        images = int(state.images)
        first_decides(lambda: runs.truncate_metrics(workdir, images))
        if images < t.images:
            with LivePage(workdir, t.images, "images") as page:
                loop(config, d, frozen, state, source, mesh, checkpoints, workdir, pipeline, page)
        else:  # stopped while its last pictures were drawn
            painter, kept = (
                Painter(d, frozen, source, mesh, pipeline, workdir),
                records.held_out(len(source), t.held_out),
            )
            make_gallery(painter, state.ema, source, workdir, images, kept)
        first_decides(lambda: finish(workdir, t.images, "images"))


def is_finished(
    config: ml_collections.ConfigDict, workdir: Path, source: records.PairSource | records.SkippingSource
) -> bool:
    """Whether the workdir has the last checkpoint of this config and its pictures; `UserError` if of another config."""
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        if checkpoints.latest() is None or checkpoints.latest() < config.train.images:
            return False
        check_config(config, checkpoints)
        return is_drawn(workdir, source, config.train.images)


def check_config(config: ml_collections.ConfigDict, checkpoints: Checkpoints) -> None:
    """Raises `UserError` unless the newest checkpoint was saved by a run of this config."""
    saved = checkpoints.metadata("pipeline", "timestep")
    if "config" not in saved:
        raise UserError(f"{checkpoints.folder}: of an older d2g_jax, without a config; choose another --workdir")
    runs.check_same(runs.to_json(config), saved["config"], checkpoints.folder)


def take_up(config: ml_collections.ConfigDict, checkpoints: Checkpoints, like: TrainState) -> TrainState:
    """The state of the newest checkpoint, placed as `like`; `UserError` unless config and networks are this run's."""
    check_config(config, checkpoints)
    state = checkpoints.restore(like)
    stopped = any(int(count) > config.train.skip_nonfinite for count in state.left_out.values())
    return guard.released(state) if stopped else state
