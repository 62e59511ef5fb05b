"""Sample grids of a run."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from d2g_jax import distributed, records
from d2g_jax import mesh as meshes
from d2g_jax.grid import grid, save_png
from d2g_jax.pipeline import Pipeline, decode
from d2g_jax.step import Distillation, Frozen, condition, generate

SAMPLES_IN_GRID = 32


class Painter:
    """Draws the same conditions again and again: teacher above, student below, for the same noise and prompt."""

    def __init__(
        self,
        d: Distillation,
        frozen: Frozen,
        source: records.PairSource | records.SkippingSource,
        mesh: jax.sharding.Mesh,
        pipeline: Pipeline,
        workdir: Path,
    ):
        count = min(SAMPLES_IN_GRID, len(source)) // meshes.batch_shards(mesh) * meshes.batch_shards(mesh)
        self._workdir, self._count = workdir, count
        if not count:
            return
        first = [source[i] for i in range(count)]
        batch = {name: np.stack([record[name] for record in first]) for name in first[0]}
        self._batch = meshes.place_whole_batch({**batch, "id": batch["id"].astype(np.uint32)}, mesh)
        self._frozen, self._vae = frozen, {"vae": pipeline.params["vae"]}

        # Every process gets all pictures: one of them could not fetch those on the others' devices.
        @functools.partial(jax.jit, out_shardings=jax.sharding.NamedSharding(mesh, P()))
        def images(params: Any, frozen: Frozen, vae: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            c = condition(d, frozen, batch)
            student = generate(d, params, c.noise, c.text)
            return decode(pipeline, vae, c.target), decode(pipeline, vae, student)

        self._images = images

    def draw(self, params: Any, images: int) -> None:
        """Writes samples/images_XXXXXXXX.png, named by images seen; all processes draw, the first one writes."""
        if not self._count:
            return
        drawn = self._images(params, self._frozen, self._vae, self._batch)
        if distributed.process_id():
            return
        teacher, student = jax.device_get(drawn)
        columns = 16
        rows = [part[i : i + columns] for i in range(0, self._count, columns) for part in (teacher, student)]
        save_png(self._workdir / "samples" / f"images_{images:08d}.png", grid(np.concatenate(rows), columns))
