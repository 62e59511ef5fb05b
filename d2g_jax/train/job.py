"""The distillation job, in the order in which things happen.

Read the config, the teacher, the pairs; build networks, losses, optimisers; take up the newest checkpoint or start from
the teacher; then step, log, draw, save until `train.images` images have been seen.
"""

from __future__ import annotations

from pathlib import Path

import ml_collections

from d2g_jax import mesh as meshes
from d2g_jax import runs
from d2g_jax.checkpoint import Checkpoints
from d2g_jax.pipeline import Pipeline
from d2g_jax.report import write_report
from d2g_jax.train.loop import loop
from d2g_jax.train.setup import TOWERS, build, check_pairs, initial_state, open_pairs


def train(config: ml_collections.ConfigDict, workdir: Path, pairs_folder: Path) -> None:
    """Trains until `config.train.images`; the same call goes on where an earlier one stopped.

    Args:
      config: see `d2g_jax/base_config.py` for every field.
      workdir: local; gets `checkpoints/`, `metrics.jsonl`, `samples/`, `report.html`, `config.json`.
      pairs_folder: a finished `pairs/1.0.0`.

    Raises:
      UserError: bad config, pairs that do not fit the teacher, a workdir of another config, a loss that is not finite.
      KeyboardInterrupt, Terminated: SIGINT or SIGTERM came; the step under way has been finished and saved.
    """
    mesh, t = meshes.make_mesh(config.mesh.data, config.mesh.fsdp), config.train
    meshes.check_batch(mesh, t.batch_size, t.groups, t.micro_batch, t.r1_micro_batch)
    source = open_pairs(config, pairs_folder)
    without = TOWERS if source.manifest.text_shapes else ()
    pipeline = Pipeline.load(config.pipeline, mesh=mesh, without=without)
    check_pairs(pairs_folder, source.manifest, pipeline)
    d, frozen = build(config, pipeline, source.manifest)
    runs.claim(workdir, config)
    state, frozen = initial_state(config, d, pipeline, mesh), meshes.place(frozen, mesh)
    with Checkpoints(workdir / "checkpoints", config.train.keep_checkpoints) as checkpoints:
        if checkpoints.latest() is not None:
            state = checkpoints.restore(state)
        runs.truncate_metrics(workdir, int(state.images))
        if int(state.images) < config.train.images:
            loop(config, d, frozen, state, source, mesh, checkpoints, workdir, pipeline)
    write_report(workdir, finished=True)
