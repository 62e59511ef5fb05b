"""What `d2g bench train` times: a run's own programs, compiled from shapes, over one random state."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from d2g_jax.bench.measure import Facts, facts_of
from d2g_jax.bench.networks import random_input_ids, random_params
from d2g_jax.config.configuration import with_settings
from d2g_jax.losses.lpips import DecodedLPIPS
from d2g_jax.pipeline.folder import placer
from d2g_jax.plan.architectures import MODELS, abstract_pipeline
from d2g_jax.plan.shapes import Shapes
from d2g_jax.runtime import mesh as meshes
from d2g_jax.train.packed import Packed, pack, unpack
from d2g_jax.train.programs import Programs, compiler_options, iteration, trace_programs, without_adversary
from d2g_jax.train.setup import Metric
from d2g_jax.train.state import TrainState, create_state
from d2g_jax.train.step import Frozen, Metrics

_PLAIN_LOOP = 8
"""Iterations of a loop in a run without R1."""


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A config as shapes, its compiled programs, and what is known of them by their names in `Programs`."""

    shapes: Shapes
    programs: Programs
    facts: dict[str, Facts]

    @property
    def config(self) -> ml_collections.ConfigDict:
        return self.shapes.config

    @property
    def with_adversary(self) -> bool:
        """Whether there is a discriminator that G comes to listen to."""
        return self.programs.g_adversarial is not None

    @property
    def loop_length(self) -> int:
        """Iterations in which every program has its share of calls."""
        return self.config.adversarial.r1_interval if self.programs.r1 is not None else _PLAIN_LOOP

    @property
    def beside_state(self) -> float:
        """Bytes that the hungriest program takes on a device beside what stays there."""
        return max(fact.temp_bytes for fact in self.facts.values())


def with_loss_and_batch(config: ml_collections.ConfigDict, loss: str, batch: int) -> ml_collections.ConfigDict:
    """A copy of a config; a pipeline of `architectures.MODELS` gets its own name."""
    pipeline = MODELS.get(config.pipeline, config.pipeline)
    return with_settings(config, {"pipeline": pipeline, "loss.name": loss, "train.batch_size": batch})


def compile_run(shapes: Shapes, names: tuple[str, ...] | None) -> Run:
    """Compiles the steps of `names` (None: all) that a run needs from its first image on; no array is made."""
    config, mesh = shapes.config, shapes.mesh
    arguments = config, shapes.d, shapes.frozen, shapes.state, shapes.batch, mesh
    programs, facts, start = {}, {}, time.perf_counter()
    for name, traced in trace_programs(*arguments, images=0, names=names):
        options = compiler_options(name, config.optimization_level, mesh)
        with meshes.traced_for(mesh):
            programs[name] = traced.lower().compile(compiler_options=options)
        facts[name] = facts_of(traced, programs[name], time.perf_counter() - start)
        start = time.perf_counter()
    return Run(shapes, Programs(**programs), facts)


def state_bytes(shapes: Shapes) -> float:
    """What stays on a device from step to step; without the VAE, which only the sample grids need."""
    return sum(held for name, held in shapes.resident_bytes().items() if name != "VAE")


class Training:
    """One random state, which every program takes and gives back (its buffers are donated), and what is frozen."""

    def __init__(self, run: Run, seed: int):
        shapes, d = run.shapes, run.shapes.d
        self.seed, self.towers = seed, _random(shapes.frozen.towers, shapes.mesh, seed + 1)
        teacher = _random(shapes.frozen.teacher, shapes.mesh, seed + 3)
        self.teacher = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), teacher, shapes.frozen.teacher)
        adversary = None if d.discriminator is None else _random(shapes.state.discriminator, shapes.mesh, seed + 2)
        state = create_state(
            _random(shapes.state.generator, shapes.mesh, seed), d.generator_optimizer, adversary,
            d.discriminator_optimizer,
        )  # fmt: skip
        self.state = meshes.place(state, shapes.mesh)

    def frozen(self, run: Run) -> Frozen:
        """Towers and teacher, and the metric of the run's loss."""
        metric, mesh = run.shapes.frozen.metric, run.shapes.mesh
        placed = None if metric is None else meshes.place(_random_metric(metric, self.seed), mesh)
        return Frozen(self.towers, placed, self.teacher)

    def data(self, run: Run) -> dict[str, np.ndarray]:
        """A batch as the loop reads it, on the host."""
        rng, batch = np.random.default_rng(self.seed), {}
        for name, shape in run.shapes.batch.items():
            batch[name] = rng.standard_normal(shape.shape, np.float32).astype(shape.dtype)
        size = run.config.train.batch_size
        batch["input_ids"] = random_input_ids(abstract_pipeline(run.config.pipeline), size, self.seed)
        return {**batch, "id": np.arange(size, dtype=np.uint32)}

    def step(self, run: Run, name: str, frozen: Frozen, batch: dict[str, jax.Array]) -> Metrics:
        """A call of the run's program `name`, waited for; D takes the targets as if they had been generated."""
        given, inputs = self.state, (batch,)
        if name == "g_regression":
            given = without_adversary(given)
        if name == "d":
            inputs = batch, jnp.transpose(batch["latents"], (0, 2, 3, 1)).astype(jnp.float32)
        state, *_, metrics = getattr(run.programs, name)(frozen, given, *inputs)
        if name == "g_regression":
            adversary = {part: getattr(self.state, part) for part in ("discriminator", "discriminator_optimizer")}
            state = dataclasses.replace(state, **adversary)
        return self._keep(state, metrics)

    def loop(self, run: Run, frozen: Frozen, data: dict[str, np.ndarray]) -> Metrics:
        """`run.loop_length` iterations as the loop does them, each with its batch from the host; one has R1."""
        config, count, size = run.config, run.loop_length, run.config.train.batch_size
        fools_from = config.adversarial.start_images + config.adversarial.warmup_images
        first = -(-fools_from // (size * count)) * count
        for step in range(first, first + count):
            batch = meshes.place_whole_batch(data, run.shapes.mesh)
            images = step * size if run.with_adversary else 0
            self.state, metrics = iteration(config, run.programs, frozen, self.state, batch, images)
        return self._keep(self.state, metrics["generator"])

    def _keep(self, state: TrainState, metrics: Metrics) -> Metrics:
        self.state = jax.block_until_ready(state)
        return metrics


def _random(shapes: Any, mesh: jax.sharding.Mesh, seed: int) -> Any:
    drawn = random_params(jax.eval_shape(unpack, shapes), seed, placer(mesh, np.float32))
    return pack(drawn) if any(isinstance(part, Packed) for part in shapes.values()) else drawn


def _random_metric(metric: Metric, seed: int) -> Metric:
    if isinstance(metric, DecodedLPIPS):
        decoder = random_params(metric.decoder, seed + 4)
        return dataclasses.replace(metric, lpips=_random_metric(metric.lpips, seed), decoder=decoder)
    rng = np.random.default_rng(seed)
    heads = tuple(jnp.asarray(0.1 * rng.random(head.shape, np.float32)) for head in metric.heads)
    return dataclasses.replace(metric, params=random_params(metric.params, seed + 3), heads=heads)
