"""A run as shapes on a mesh: everything that its programs are traced with, and no array."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import ml_collections
import numpy as np

from d2g_jax import records
from d2g_jax.models.platform import compiling_for
from d2g_jax.pairs.job import planned_manifest
from d2g_jax.plan.architectures import abstract_metric, abstract_pipeline
from d2g_jax.runtime import mesh as meshes
from d2g_jax.train.programs import trace_programs
from d2g_jax.train.setup import build, first_state
from d2g_jax.train.state import TrainState
from d2g_jax.train.step import Distillation, Frozen


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a run holds on its devices, every leaf a `jax.ShapeDtypeStruct` with its sharding.

    Attributes:
      config: of the run.
      mesh: of the target's devices.
      d: networks, losses and optimisers.
      frozen, state, batch: the programs' arguments.
      vae: parameters that the sample grids keep on the devices; no step reads them.
    """

    config: ml_collections.ConfigDict
    mesh: jax.sharding.Mesh
    d: Distillation
    frozen: Frozen
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    vae: Any

    def on(self, mesh: meshes.Mesh) -> Shapes:
        """The same run on another mesh."""
        placed = lambda tree: meshes.place(tree, mesh)  # noqa: E731
        batch = _split(self.batch, mesh)
        return dataclasses.replace(
            self, mesh=mesh, frozen=placed(self.frozen), state=placed(self.state), batch=batch, vae=placed(self.vae)
        )

    def samples(self, step: str) -> int:
        """Of one device in a call of a step: its share of the batch, for "r1" of the groups."""
        t = self.config.train
        return (t.groups if step == "r1" else t.batch_size) // meshes.batch_shards(self.mesh)

    def micro_batch(self, step: str) -> int | None:
        """What of its samples a device takes at once; None for all."""
        t = self.config.train
        return t.r1_micro_batch if step == "r1" else t.micro_batch

    def trace(self, platform: str) -> dict[str, jax.stages.Traced]:
        """The run's planned steps, formulated for "cpu", "gpu", "tpu" or `ANY`."""
        arguments = self.config, self.d, self.frozen, self.state, self.batch, self.mesh
        with compiling_for(platform):
            return dict(trace_programs(*arguments, images=0, names=planned_steps(self.config)))

    def resident_bytes(self) -> dict[str, float]:
        """What stays on each device from step to step, by what it is."""
        return {
            "generator": device_bytes(self.state.generator),
            "its average": device_bytes(self.state.ema),
            "its moments": device_bytes(self.state.generator_optimizer),
            "discriminator": device_bytes(self.state.discriminator),
            "its own moments": device_bytes(self.state.discriminator_optimizer),
            "text towers and metric": device_bytes((self.frozen.towers, self.frozen.metric)),
            "frozen teacher": device_bytes(self.frozen.teacher),
            "counters": device_bytes((self.state.step, self.state.images, self.state.left_out)),
            "VAE": device_bytes(self.vae),
            "batches": 2 * device_bytes(self.batch),  # the next one is on its way
        }


def device_bytes(tree: Any) -> float:
    """Bytes of a tree of shapes with shardings on one device."""
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def planned_steps(config: ml_collections.ConfigDict) -> tuple[str, ...] | None:
    """Names of the steps that are planned; None for all that a run has.

    Of a run with an adversary not "g_regression", which "g_adversarial" contains: it takes less of everything.
    """
    a = config.adversarial
    fools = bool(a.weight) and config.train.images > a.start_images + a.warmup_images
    return ("g_adversarial", "d", "r1") if fools else None


def run_shapes(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> Shapes:
    """The shapes of `d2g train --config=...` on a mesh; raises `UserError` as that would before its first step."""
    t = config.train
    meshes.check_batch(mesh, t.batch_size, t.groups, t.micro_batch, t.r1_micro_batch)
    pipeline = abstract_pipeline(config.pipeline)
    manifest = planned_manifest(config, pipeline)
    d, frozen = build(config, pipeline, manifest, abstract_metric(config.loss, pipeline))
    state = jax.eval_shape(functools.partial(first_state, config, d), pipeline.params["unet"])
    batch = batch_shapes(config.train.batch_size, manifest)
    return Shapes(config, mesh, d, frozen, state, batch, pipeline.params["vae"]).on(mesh)


def batch_shapes(batch_size: int, manifest: records.Manifest) -> dict[str, jax.ShapeDtypeStruct]:
    """One global batch as the loop reads it."""
    tensors = manifest.schema().tensors()
    fields = {name: tensors[name] for name in ("input_ids", "latents", *manifest.text_shapes)}
    fields["id"] = ((), np.dtype(np.uint32))
    return {name: jax.ShapeDtypeStruct((batch_size, *shape), dtype) for name, (shape, dtype) in fields.items()}


def _split(batch: dict[str, jax.ShapeDtypeStruct], mesh: meshes.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    sharding = jax.sharding.NamedSharding(mesh, meshes.BATCH)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for name, x in batch.items()}
