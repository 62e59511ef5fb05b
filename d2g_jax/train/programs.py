"""The compiled steps of a run, and one iteration of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from d2g_jax.runtime import mesh as meshes
from d2g_jax.train.state import TrainState
from d2g_jax.train.step import Distillation, Frozen, Metrics, d_step, g_step, r1_step


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled steps; the state's buffers are donated to the next state. None for a step that this run lacks."""

    g_regression: Any = None
    g_adversarial: Any = None
    d: Any = None
    r1: Any = None

    def memory(self) -> float:
        """GiB of a device for the largest step: arguments, temporaries and results that are not written over them."""
        found = [one.memory_analysis() for one in vars(self).values() if one is not None]
        sizes = (
            m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
            for m in found
        )
        return round(max(sizes) / 2**30, 3)


def compile_programs(
    config: ml_collections.ConfigDict,
    d: Distillation,
    frozen: Frozen,
    state: TrainState,
    batch: dict[str, jax.Array],
    mesh: jax.sharding.Mesh,
) -> Programs:
    """Compiles all that the rest of the run needs: no pause when the adversary starts, no late surprise.

    A program is traced under Python's lock and compiled without it: the next one is traced meanwhile, and
    `train.compile_workers` threads share the work.
    """
    compiled = {}
    with ThreadPoolExecutor(config.train.compile_workers) as pool:
        for name, traced in trace_programs(config, d, frozen, state, batch, mesh, int(state.images)):
            with meshes.traced_for(mesh):
                lowered = traced.lower()
            options = compiler_options(name, config.optimization_level, mesh)
            compiled[name] = pool.submit(lowered.compile, compiler_options=options)
        return Programs(**{name: program.result() for name, program in compiled.items()})


def compiler_options(name: str, level: str, mesh: jax.sharding.Mesh) -> dict[str, int]:
    """What O0 to O3 mean for a step on CPUs, where XLA's own level changes nothing: LLVM's.

    Of the penalty's step always O0, where a level is set: it is the largest program and the least work, a few samples
    every `r1_interval` iterations.
    """
    if mesh.devices.flat[0].platform != "cpu" or level == "UNKNOWN":
        return {}
    return {"xla_backend_optimization_level": 0 if name == "r1" else int(level[1])}


def trace_programs(
    config: ml_collections.ConfigDict,
    d: Distillation,
    frozen: Frozen,
    state: TrainState,
    batch: dict[str, jax.Array],
    mesh: jax.sharding.Mesh,
    images: int,
    names: Collection[str] | None = None,
) -> Iterator[tuple[str, jax.stages.Traced]]:
    """The steps that a run needs after `images` (of `names` only), each traced when its turn comes, after its name.

    Of `frozen`, `state` and `batch` only shapes, dtypes and shardings are looked at: `jax.ShapeDtypeStruct`s will do.
    """
    a, t = config.adversarial, config.train
    fools_from = a.start_images + a.warmup_images
    adversary, alone = bool(a.weight) and t.images > a.start_images, without_adversary(state)
    batch_sharding = jax.sharding.NamedSharding(mesh, meshes.BATCH)
    shape = (t.batch_size, *np.asarray(batch["latents"].shape)[[2, 3, 1]])
    generated = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch_sharding)
    of = functools.partial(jax.tree.map, lambda x: x.sharding)
    steps = {}
    if not adversary or images < fools_from:
        steps["g_regression"] = (functools.partial(g_step, d, False), (alone, batch), (of(alone), batch_sharding, None))
    if adversary and t.images > fools_from:
        steps["g_adversarial"] = (functools.partial(g_step, d, True), (state, batch), (of(state), batch_sharding, None))
    if adversary:
        steps["d"] = (functools.partial(d_step, d), (state, batch, generated), (of(state), None))
    if adversary and d.discriminator_r1 is not None:
        steps["r1"] = (functools.partial(r1_step, d), (state, batch), (of(state), None))
    for name, (step, arguments, out) in steps.items():
        if names is None or name in names:
            with meshes.traced_for(mesh):
                traced = jax.jit(step, donate_argnums=1, out_shardings=out).trace(frozen, *arguments)
            yield name, traced


def without_adversary(state: TrainState) -> TrainState:
    """The state of a regression-only run: its program is then the same, and may have been compiled before."""
    return dataclasses.replace(state, discriminator={}, discriminator_optimizer={})


def iteration(
    config: ml_collections.ConfigDict,
    programs: Programs,
    frozen: Frozen,
    state: TrainState,
    batch: dict[str, jax.Array],
    images: int,
) -> tuple[TrainState, dict[str, Metrics]]:
    """One update of G and, once the adversary has started, of D; `images` seen before it decide the phase.

    The metrics are those of each update under its name.
    """
    a, step = config.adversarial, images // config.train.batch_size
    discriminates = bool(a.weight) and images >= a.start_images
    fools = discriminates and images >= a.start_images + a.warmup_images
    if fools:
        state, generated, g_metrics = programs.g_adversarial(frozen, state, batch)
    else:
        adversary = {name: getattr(state, name) for name in ("discriminator", "discriminator_optimizer")}
        alone, generated, g_metrics = programs.g_regression(frozen, without_adversary(state), batch)
        state = dataclasses.replace(alone, **adversary)
    metrics = {"generator": g_metrics}
    if discriminates:
        state, metrics["discriminator"] = programs.d(frozen, state, batch, generated)
        if programs.r1 is not None and step % a.r1_interval == 0:
            state, metrics["r1"] = programs.r1(frozen, state, batch)
    # Simulated CPU devices abort when the host runs ahead of them; elsewhere the host may run ahead.
    if jax.default_backend() == "cpu":
        jax.block_until_ready(state)
    return state, metrics
