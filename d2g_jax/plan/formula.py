"""A plan without a compiler: the steps are traced for one micro-batch on one device and counted (see trace.py).

State, frozen parameters and batch are exact. Temporaries, bytes and collectives are a model of what a compiler does.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections

from d2g_jax.config.configuration import with_settings
from d2g_jax.models.attention import MANY_KEYS
from d2g_jax.models.platform import ANY
from d2g_jax.plan import store
from d2g_jax.plan.collectives import Collective
from d2g_jax.plan.programs import Program
from d2g_jax.plan.shapes import Shapes, device_bytes, run_shapes
from d2g_jax.plan.targets import Target
from d2g_jax.plan.trace import Assumptions, Cost, program_cost
from d2g_jax.runtime import mesh as meshes

CODE_BYTES = 200 * 2**20
"""Assumed of one compiled step."""

FUSED_FROM = {"gpu": 1, "cpu": MANY_KEYS}
"""Keys from which on half-precision attention never writes its weights, by platform: see models/attention.py. A TPU's
kernel is in the trace."""


def traced_platform(target: Target) -> str:
    """For what programs are traced that a formula counts.

    For no platform: kernels that stand for attention are opaque, and cannot be traced where no GPU is; `Assumptions`
    says what they save. For TPUs theirs is in the trace, because of how its operands lie in memory.
    """
    return "tpu" if target.chip.platform == "tpu" else ANY


def formula_programs(shapes: Shapes, target: Target) -> dict[str, Program]:
    """The planned steps of a run, counted for one device of the target."""
    micro = {name: min(shapes.samples(name), shapes.micro_batch(name) or math.inf) for name in ("g", "r1")}
    costs = micro_batch_costs(shapes, target, int(micro["g"]), int(micro["r1"]))
    return {name: formula_program(name, cost, int(micro[_kind(name)]), shapes) for name, cost in costs.items()}


def _kind(name: str) -> str:
    return "r1" if name == "r1" else "g"


def micro_batch_costs(shapes: Shapes, target: Target, micro: int, r1_micro: int) -> dict[str, Cost]:
    """Of each planned step at these micro-batches the cost of one, with the optimiser's update behind it."""
    whole = math.lcm(micro, r1_micro)
    changes = {"train.batch_size": whole, "train.groups": r1_micro, "train.micro_batch": micro}
    changes |= {"train.r1_micro_batch": r1_micro, "mesh.data": 1, "mesh.fsdp": 1}
    one = with_settings(shapes.config, changes).to_json()
    given = Assumptions(parameter_shares(shapes), FUSED_FROM.get(target.chip.platform))
    platform = traced_platform(target)
    key = {
        "costs of": json.loads(one),
        "platform": platform,
        "shares": sorted([list(shape), share] for shape, share in given.shares.items()),
        "fused_from": given.fused_from,
        "source": store.source_hash(),
        **store.versions(),
    }
    count = lambda jaxpr: dataclasses.asdict(program_cost(jaxpr, given))  # noqa: E731
    costs = store.cached(key, lambda: {name: count(jaxpr) for name, jaxpr in _jaxprs(one, platform).items()})
    samples = {name: r1_micro if name == "r1" else whole for name in costs}
    divisor = {name: samples[name] // (r1_micro if name == "r1" else micro) for name in costs}
    return {name: _one_of(Cost(**fields), divisor[name], name, shapes) for name, fields in costs.items()}


@functools.lru_cache(maxsize=2)
def _jaxprs(config: str, platform: str) -> dict[str, Any]:
    """The planned steps of a config, given as JSON, traced on one device for a platform."""
    local = run_shapes(ml_collections.ConfigDict(json.loads(config)), meshes.make_mesh(1, 1, jax.devices("cpu")[:1]))
    return {name: traced.jaxpr for name, traced in local.trace(platform).items()}


def parameter_shares(shapes: Shapes) -> dict[tuple[int, ...], float]:
    """The part of each parameter's shape that a device holds; of matrices also transposed, as some gradients are."""
    shares = {}
    for leaf in jax.tree.leaves((shapes.state.generator, shapes.state.discriminator, shapes.frozen)):
        share = device_bytes(leaf) / max(leaf.size * leaf.dtype.itemsize, 1)
        for shape in (leaf.shape, leaf.shape[::-1]) if len(leaf.shape) == 2 else (leaf.shape,):
            if len(leaf.shape) > 1:
                shares[shape] = share
    return shares


def update_bytes(name: str, shapes: Shapes) -> float:
    """What an optimiser's update reads and writes: parameters, moments, and for the generator its average."""
    state = shapes.state
    if name.startswith("g_"):
        return 2 * device_bytes((state.generator, state.ema, state.generator_optimizer))
    return 2 * device_bytes((state.discriminator, state.discriminator_optimizer))


def _one_of(cost: Cost, parts: int, name: str, shapes: Shapes) -> Cost:
    """The cost of one of `parts` micro-batches that `cost` has before its one update."""
    if parts == 1:
        return cost
    update = update_bytes(name, shapes)
    return _times(dataclasses.replace(cost, memory_bytes=cost.memory_bytes - update), 1 / parts, update)


def _times(cost: Cost, times: float, update: float) -> Cost:
    return dataclasses.replace(Cost(memory_bytes=update).then(cost, times), temp_bytes=cost.temp_bytes)


def formula_program(name: str, cost: Cost, micro: int, shapes: Shapes) -> Program:
    """A step by formula, from the cost of a micro-batch of so many samples with the update behind it."""
    parts = shapes.samples(_kind(name)) / micro
    update = min(update_bytes(name, shapes), cost.memory_bytes)
    trained = shapes.state.generator if name.startswith("g_") else shapes.state.discriminator
    total = _times(dataclasses.replace(cost, memory_bytes=cost.memory_bytes - update), parts, update)
    generated = device_bytes(shapes.batch["latents"]) * 4 / shapes.batch["latents"].dtype.itemsize
    returned = generated if name.startswith("g_") else 0.0
    return Program(
        name,
        "formula",
        argument_bytes=device_bytes((shapes.frozen, shapes.state, shapes.batch)),
        output_bytes=device_bytes(shapes.state) + returned,
        alias_bytes=device_bytes(shapes.state),
        temp_bytes=cost.temp_bytes + (device_bytes(trained) if parts > 1 else 0.0),  # the sum of gradients
        code_bytes=CODE_BYTES,
        cost=dataclasses.replace(total, temp_bytes=cost.temp_bytes),
        collectives=collectives(total, *(shapes.mesh.shape[axis] for axis in ("data", "fsdp"))),
    )


def collectives(cost: Cost, data: int, fsdp: int) -> tuple[Collective, ...]:
    """Parameters gathered over `fsdp`; gradients summed over all devices in one piece, as XLA does, and then cut."""
    found = []
    if fsdp > 1:
        found.append(Collective("all-gather", cost.gathered_bytes, fsdp))
    if data * fsdp > 1:
        found.append(Collective("all-reduce", cost.reduced_bytes, data * fsdp))
    return tuple(found)


def interpolate(costs: Mapping[int, Cost], micro: int) -> Cost:
    """The cost of a micro-batch from those of two others, unless it is one of them: everything grows by the sample."""
    if micro in costs:
        return costs[micro]
    first, second = sorted(costs)
    low, high = (dataclasses.asdict(costs[n]) for n in (first, second))
    steps = (micro - first) / (second - first)
    return Cost(**{name: low[name] + steps * (high[name] - low[name]) for name in low})
