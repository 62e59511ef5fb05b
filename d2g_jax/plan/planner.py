"""From a config and a topology to a plan that fits, if there is one."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections

from d2g_jax.config.configuration import with_settings
from d2g_jax.models.layers import REMATS
from d2g_jax.plan import store
from d2g_jax.plan.formula import CODE_BYTES, formula_program, formula_programs, interpolate, micro_batch_costs
from d2g_jax.plan.plan import Plan, from_json, to_json
from d2g_jax.plan.programs import Program, compile_program
from d2g_jax.plan.settings import MOMENTS, settings
from d2g_jax.plan.shapes import Shapes, run_shapes
from d2g_jax.plan.targets import Target, described_tpu, devices
from d2g_jax.plan.trace import Cost
from d2g_jax.runtime import mesh as meshes
from d2g_jax.train.state import MOMENT_DTYPES

PROBES = (1, 2)
"""Micro-batches that are traced; those between and beyond are interpolated until one is chosen."""

_BY_ARRAYS = {"train.packed": False}  # what formulas see of a network


def plan_run(config: ml_collections.ConfigDict, target: Target, method: str) -> Plan:
    """The plan of a config as it is, but for packed networks, which are planned array by array: formulas go by arrays.

    Args:
      method: "compile" for the target's own compiler, "formula" for the traced program alone. GPUs are always planned
        by formula: XLA compiles for a GPU only where one is.

    Raises:
      UserError: a mesh that does not divide, a batch that does not, no libtpu, an unknown pipeline.
    """
    config = with_settings(config, _BY_ARRAYS)
    method = "formula" if target.chip.platform == "gpu" else method
    key = {
        "config": json.loads(config.to_json()),
        "target": dataclasses.asdict(target),
        "method": method,
        "source": store.source_hash(),
        **store.versions(),
    }
    return from_json(store.cached(key, lambda: to_json(_plan(config, target, method))))


def _plan(config: ml_collections.ConfigDict, target: Target, method: str) -> Plan:
    shape = meshes.mesh_shape(config.mesh.data, config.mesh.fsdp, target.count)
    shapes = run_shapes(config, jax.sharding.AbstractMesh(shape, ("data", "fsdp")))
    programs = formula_programs(shapes, target)
    resident = shapes.resident_bytes()
    if method == "compile":
        with described_tpu():
            traced = shapes.on(meshes.make_mesh(*shape, devices=devices(target))).trace(target.chip.platform)
            programs = {name: compile_program(name, traced[name], programs[name].cost, target) for name in traced}
    return _make(config, target, shape, resident, programs)


def _make(
    config: ml_collections.ConfigDict,
    target: Target,
    shape: tuple[int, int],
    resident: Mapping[str, float],
    programs: Mapping[str, Any],
) -> Plan:
    return Plan(
        name=config.name,
        target=target,
        settings=settings(config),
        batch_size=config.train.batch_size,
        mesh=shape,
        resident=resident,
        programs=tuple(programs.values()),
        calls=calls_per_iteration(config, programs),
        images=config.train.images,
    )


def calls_per_iteration(config: ml_collections.ConfigDict, programs: Mapping[str, Any]) -> dict[str, float]:
    """How often each step runs in an iteration once the adversary has started."""
    return {name: 1.0 / config.adversarial.r1_interval if name == "r1" else 1.0 for name in programs}


def find_fit(
    config: ml_collections.ConfigDict, target: Target, method: str, most: int = 4
) -> tuple[Plan | None, list[Plan]]:
    """The cheapest change of mesh, rematerialisation, micro-batch and moments' precision that makes a config fit.

    All combinations are estimated by formula and put in the order of their time for an iteration, fewer changes first
    among equals. The first is planned by `method`. If it does not fit, the compiler takes more than the formula says,
    and what is allowed by formula shrinks by as much: the next is one with smaller micro-batches, or recomputes more.

    Returns:
      The plan that fits, or None; and the plans that were tried before it, at most `most`.
    """
    tried: list[Plan] = []
    room = float(target.chip.memory_bytes)
    while len(tried) < most:
        fitting = ranked(config, target, room)
        if not fitting:
            break
        changes, estimate = fitting[0]
        plan = plan_run(with_settings(config, changes), target, method)
        if plan.fits:
            return plan, tried
        tried.append(plan)
        room = estimate.total_bytes() * target.chip.memory_bytes / plan.total_bytes()
    return None, tried


def ranked(
    config: ml_collections.ConfigDict, target: Target, room: float | None = None
) -> list[tuple[dict[str, Any], Plan]]:
    """Changes that take at most `room` bytes by formula (None: the device's) with their plans, cheapest first."""
    room = target.chip.memory_bytes if room is None else room
    fitting = [(changes, plan) for changes, plan in candidates(config, target, room) if plan.total_bytes() <= room]

    def cost(candidate: tuple[dict[str, Any], Plan]) -> tuple[float, int]:
        changes, plan = candidate
        seconds = plan.floor_seconds()
        return (round(seconds["floor"] + seconds["links"], 3) if seconds else 0.0), len(changes)

    return sorted(fitting, key=cost)


def candidates(config: ml_collections.ConfigDict, target: Target, room: float) -> Iterator[tuple[dict[str, Any], Plan]]:
    """Every mesh, rematerialisation and precision from the config's own on, each with its largest micro-batches.

    Within these, a larger micro-batch is never slower: parameters are gathered less often.
    """
    here, config = settings(config), with_settings(config, _BY_ARRAYS)
    runs = {
        dtype: run_shapes(
            with_settings(config, dict.fromkeys(MOMENTS, dtype)),
            jax.sharding.AbstractMesh((1, target.count), ("data", "fsdp")),
        )
        for dtype in MOMENT_DTYPES[MOMENT_DTYPES.index(here[MOMENTS[0]]) :]
    }
    share, r1_share = config.train.batch_size // target.count, config.train.groups // target.count
    probes = {n: min(n, r1_share) for n in PROBES if n <= share}
    for remat, fsdp in itertools.product(REMATS[REMATS.index(here["train.remat"]) :], _fsdps(here, target)):
        mesh = jax.sharding.AbstractMesh((target.count // fsdp, fsdp), ("data", "fsdp"))
        traced = dataclasses.replace(runs[here[MOMENTS[0]]], config=with_settings(config, {"train.remat": remat}))
        costs = {n: micro_batch_costs(traced.on(mesh), target, n, r1) for n, r1 in probes.items()}
        for dtype, run in runs.items():
            micros, plan = _largest_micro_batches(config, target, run.on(mesh), costs, room)
            now = {"train.remat": remat, "mesh.fsdp": fsdp, **dict.fromkeys(MOMENTS, dtype), **micros}
            changes = {name: value for name, value in now.items() if value != here[name]}
            if "mesh.fsdp" in changes:
                changes["mesh.data"] = -1
            yield changes, dataclasses.replace(plan, settings={**here, **now})


def _largest_micro_batches(
    config: ml_collections.ConfigDict,
    target: Target,
    shapes: Shapes,
    costs: Mapping[int, Mapping[str, Cost]],
    room: float,
) -> tuple[dict[str, int | None], Plan]:
    """The largest micro-batches with which every step takes at most `room` bytes, or the smallest if none does so.

    Returns them, and the plan with them.
    """
    chosen: dict[str, Program] = {}
    found: dict[str, int | None] = {}
    mesh, resident = (shapes.mesh.shape["data"], shapes.mesh.shape["fsdp"]), shapes.resident_bytes()
    names = list(next(iter(costs.values())))
    for knob, steps in (
        ("train.micro_batch", [name for name in names if name != "r1"]),
        ("train.r1_micro_batch", [name for name in names if name == "r1"]),
    ):
        share, own = shapes.samples("r1" if "r1" in knob else "g"), settings(config)[knob]
        for micro in [n for n in range(min(own or share, share), 0, -1) if share % n == 0]:
            at = {
                name: formula_program(
                    name, interpolate({m: c[name] for m, c in costs.items() if m <= share}, micro), micro, shapes
                )
                for name in steps
            }
            plan = _make(config, target, mesh, resident, {**chosen, **at})
            if plan.total_bytes() + (len(names) - len(plan.programs)) * CODE_BYTES <= room:
                break
        found[knob] = own if own is None and micro == share else micro
        chosen |= at
    return found, _make(config, target, mesh, resident, chosen)


def _fsdps(here: Mapping[str, Any], target: Target) -> list[int]:
    return [n for n in range(here["mesh.fsdp"], target.count + 1) if target.count % n == 0]
