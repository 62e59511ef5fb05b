"""A plan without a compiler: the steps are traced for one device's share of the batch and counted (see trace.py).

State, frozen parameters and batch are exact. Temporaries, bytes and collectives are a model of what a compiler does.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections

from d2g_jax import mesh as meshes
from d2g_jax.plan.collectives import Collective
from d2g_jax.plan.programs import Program
from d2g_jax.plan.shapes import Shapes, device_bytes, run_shapes
from d2g_jax.plan.targets import Target
from d2g_jax.plan.trace import Assumptions, Cost, program_cost

CODE_BYTES = 200 * 2**20
"""Of one program; SD 1.5's compiled ones take 100 to 300 MB."""


def trace_share(config: ml_collections.ConfigDict, devices: int) -> dict[str, Any]:
    """The jaxprs of a run's steps for one device's samples, under their names."""
    local = run_shapes(share_of_one_device(config, devices), meshes.make_mesh(1, 1, jax.devices("cpu")[:1]))
    # As for CPU: kernels that stand for attention elsewhere cannot be looked into.
    return {name: traced.jaxpr for name, traced in local.trace("cpu").items()}


def count_programs(jaxprs: Mapping[str, Any], shapes: Shapes, target: Target) -> dict[str, Program]:
    """The steps by formula: traced for one device's share, state and parameters sharded as `shapes` are."""
    given = Assumptions(parameter_shares(shapes), fused_attention=target.chip.platform == "gpu")
    return {name: formula_program(name, program_cost(jaxpr, given), shapes) for name, jaxpr in jaxprs.items()}


def share_of_one_device(config: ml_collections.ConfigDict, devices: int) -> ml_collections.ConfigDict:
    """The same run on one device with one device's samples."""
    local = copy.deepcopy(config)
    with local.unlocked():
        local.train.batch_size //= devices
        local.train.groups //= devices
        local.mesh.update({"data": 1, "fsdp": 1})
    return local


def parameter_shares(shapes: Shapes) -> dict[tuple[int, ...], float]:
    """The part of each parameter's shape that a device holds; of matrices also transposed, as some gradients are."""
    shares = {}
    for leaf in jax.tree.leaves((shapes.state.generator, shapes.state.discriminator, shapes.frozen)):
        share = device_bytes(leaf) / max(leaf.size * leaf.dtype.itemsize, 1)
        for shape in (leaf.shape, leaf.shape[::-1]) if len(leaf.shape) == 2 else (leaf.shape,):
            if len(leaf.shape) > 1:
                shares[shape] = share
    return shares


def formula_program(name: str, cost: Cost, shapes: Shapes) -> Program:
    """A step of which only the cost is known."""
    arguments = device_bytes((shapes.frozen, shapes.state, shapes.batch))
    generated = device_bytes(shapes.batch["latents"]) * 4 / shapes.batch["latents"].dtype.itemsize
    return Program(
        name,
        "formula",
        argument_bytes=arguments,
        output_bytes=device_bytes(shapes.state) + generated,
        alias_bytes=device_bytes(shapes.state),
        temp_bytes=cost.temp_bytes,
        code_bytes=CODE_BYTES,
        cost=cost,
        collectives=collectives(cost, *(shapes.mesh.shape[axis] for axis in ("data", "fsdp"))),
    )


def collectives(cost: Cost, data: int, fsdp: int) -> tuple[Collective, ...]:
    """Parameters gathered over `fsdp`; gradients summed and scattered over it, and their parts summed over `data`."""
    found = []
    if fsdp > 1:
        found.append(Collective("all-gather", cost.gathered_bytes, fsdp))
        found.append(Collective("reduce-scatter", cost.reduced_bytes, fsdp))
    if data > 1:
        found.append(Collective("all-reduce", cost.reduced_bytes / fsdp, data))
    return tuple(found)


def interpolate(costs: Mapping[int, Cost], micro_batch: int) -> Cost:
    """The cost at a micro-batch from those at one or two: memory grows with it, the traffic of parameters shrinks."""
    if micro_batch in costs or len(costs) == 1:
        return costs.get(micro_batch) or next(iter(costs.values()))
    first, second = sorted(costs)
    small, large = costs[first], costs[second]
    steps = (micro_batch - first) / (second - first)
    fewer = (1 / micro_batch - 1 / second) / (1 / first - 1 / second)
    linear = {"temp_bytes": small.temp_bytes + steps * (large.temp_bytes - small.temp_bytes)}
    for name in ("memory_bytes", "gathered_bytes", "reduced_bytes"):  # a + b / micro_batch
        low, high = getattr(small, name), getattr(large, name)
        linear[name] = max(high + fewer * (low - high), 0.0)
    return dataclasses.replace(small, **linear)
