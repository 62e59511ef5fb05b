"""One-step sampling as a plan sees it: text towers, UNet and VAE for one batch on one device of a target.

Each device draws images of its own and nothing is sent, so that one stands for all. The programs are those of
`d2g sample`, traced with shapes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from d2g_jax.config.configuration import compute_dtype
from d2g_jax.diffusion.schedule import Schedule
from d2g_jax.diffusion.systems import OneStep
from d2g_jax.inputs.places import expanded, is_there
from d2g_jax.models.platform import compiling_for
from d2g_jax.pipeline.draw import one_step_programs
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.plan.architectures import MODELS, abstract_pipeline, computing_in
from d2g_jax.plan.formula import CODE_BYTES, FUSED_FROM, traced_platform
from d2g_jax.plan.plan import program_seconds
from d2g_jax.plan.programs import Program, compile_program
from d2g_jax.plan.targets import Target, described_tpu, devices
from d2g_jax.plan.trace import Assumptions, program_cost
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.errors import UserError
from d2g_jax.sample import exported


@dataclasses.dataclass(frozen=True)
class SamplingPlan:
    """Figures are of one device and one batch.

    Attributes:
      model: as it was asked for.
      target: what it is planned for.
      dtype: of the networks and of their kernels and embeddings.
      batch: images in a call.
      programs: "text", "unet" and "vae", which run one after another.
    """

    model: str
    target: Target
    dtype: str
    batch: int
    programs: tuple[Program, ...]

    @property
    def method(self) -> str:
        """ "compiled" or "formula", of all programs."""
        return self.programs[0].method

    def total_bytes(self) -> float:
        """All weights and inputs, all code, and the most that one program takes beside them."""
        stays = sum((p.argument_bytes or 0.0) + (p.code_bytes or 0.0) for p in self.programs)
        total = stays + max(p.beside_arguments or 0.0 for p in self.programs)
        return max([total, *(p.needed_bytes for p in self.programs if p.needed_bytes is not None)])

    @property
    def fits(self) -> bool:
        refused = any(p.needed_bytes is not None for p in self.programs)
        return not refused and self.total_bytes() <= self.target.chip.memory_bytes

    def floors(self) -> dict[str, dict[str, float]] | None:
        """Least seconds of a call of each program, and of "all"; None where the chip's peaks are unknown.

        "products": for those at the peak; "seconds": with memory traffic. Their quotient is the most of the peak that
        the call can have.
        """
        if self.target.chip.bf16_flops is None:
            return None
        floors = {}
        for program in self.programs:
            parts = program_seconds(program, self.target.chip)
            floors[program.name] = {"products": parts["products"], "seconds": max(parts.values())}
        together = {name: sum(floor[name] for floor in floors.values()) for name in ("products", "seconds")}
        return {**floors, "all": together}


def plan_sampling(model: str, target: Target, dtype: str, batch: int, method: str) -> SamplingPlan:
    """One-step sampling by a model of `architectures.MODELS`, a hub id that is known there, or a folder.

    Args:
      model: see above; only its configs are read.
      target: one of its devices is planned.
      dtype: float32 or bfloat16.
      batch: images on that device.
      method: "compile" or "formula"; see `planner.plan_run`.

    Raises:
      UserError: for an unknown model or dtype, and without libtpu.
    """
    compute = compute_dtype("--dtype", dtype)
    folder = expanded(model)
    if is_there(folder) and folder.is_dir() and not (folder / "model_index.json").is_file():
        known = ", ".join(MODELS)
        raise UserError(f"--model={model}: no pipeline folder; give one, of a student its teacher's, or {known}")
    method = "formula" if target.chip.platform == "gpu" else method
    pipeline = computing_in(abstract_pipeline(MODELS.get(model, model)), compute)
    shapes = {name: exported.stored_shapes(params, compute) for name, params in pipeline.params.items()}
    pipeline = dataclasses.replace(pipeline, params=shapes)
    host = meshes.make_mesh(1, 1, jax.devices("cpu")[:1])
    local = _trace(pipeline, host, batch, traced_platform(target))
    programs = {name: _by_formula(name, traced, target) for name, traced in local.items()}
    if method == "compile":
        with described_tpu():
            mesh = meshes.make_mesh(1, 1, devices(target)[:1])
            traced = _trace(pipeline, mesh, batch, target.chip.platform)
            programs = {name: _compiled(traced[name], program, target) for name, program in programs.items()}
    return SamplingPlan(model, target, dtype, batch, tuple(programs.values()))


def _compiled(traced: jax.stages.Traced, formula: Program, target: Target) -> Program:
    program = compile_program(formula.name, traced, formula.cost, target)
    # Weights that a program leaves aside, as those of the VAE's encoder, are on the device all the same.
    return dataclasses.replace(program, argument_bytes=max(formula.argument_bytes, program.argument_bytes or 0.0))


def _trace(pipeline: Pipeline, mesh: jax.sharding.Mesh, batch: int, platform: str) -> dict[str, jax.stages.Traced]:
    """The programs for one batch, formulated for "cpu", "tpu" or `ANY`."""
    height, width, channels = pipeline.latent_shape
    whole = jax.sharding.NamedSharding(mesh, meshes.BATCH)

    def given(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    timestep = Schedule.from_config(pipeline.scheduler).num_train_timesteps - 1
    with compiling_for(platform):
        programs = one_step_programs(pipeline, pipeline.params["unet"], OneStep(timestep), mesh)
        trace = lambda program, *inputs: program.func.trace(*program.args, *inputs)  # noqa: E731
        text = trace(programs.encode, given((batch, pipeline.token_length), jnp.int32))
        condition = jax.tree.map(lambda x: given(x.shape, x.dtype), text.out_info)
        unet = trace(programs.solve, given((batch, channels, height, width), jnp.float32), condition)
        vae = trace(programs.decode, given(unet.out_info.shape, unet.out_info.dtype))
    return {"text": text, "unet": unet, "vae": vae}


def _by_formula(name: str, traced: jax.stages.Traced, target: Target) -> Program:
    cost = program_cost(traced.jaxpr, Assumptions({}, FUSED_FROM.get(target.chip.platform)))
    size = lambda tree: float(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)))  # noqa: E731
    return Program(
        name,
        "formula",
        argument_bytes=size(traced.jaxpr.in_avals),
        output_bytes=size(traced.out_info),
        alias_bytes=0.0,
        temp_bytes=cost.temp_bytes,
        code_bytes=CODE_BYTES,
        cost=cost,
        collectives=(),
    )


def to_json(plan: SamplingPlan) -> dict[str, Any]:
    """Everything, derived figures too, as plain values."""
    return {
        **dataclasses.asdict(plan),
        "method": plan.method,
        "total_bytes": plan.total_bytes(),
        "fits": plan.fits,
        "floors": plan.floors(),
    }
