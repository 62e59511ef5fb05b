"""`d2g bench pairs`: the teacher's solutions, side by side with diffusers' own pipeline class and the same weights.

In one run and in turns: prompts and noise to latents by the programs of `d2g pairs`, and by diffusers' class with the
same steps, guidance, batch, precision and noise. Nothing is decoded.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2g_jax.bench import torch_pairs, torch_pipeline
from d2g_jax.bench.measure import (
    Bar,
    Candidate,
    check_counts,
    does_not_fit,
    make_report,
    product_candidate,
    ratio,
    time_in_turns,
)
from d2g_jax.bench.networks import default_dtype, known, random_pipeline
from d2g_jax.bench.programs import Compiled, together
from d2g_jax.config.configuration import compute_dtype
from d2g_jax.diffusion import noise
from d2g_jax.digits.config import WEIGHTS
from d2g_jax.inputs.numbers import SEED
from d2g_jax.inputs.places import expanded, is_there
from d2g_jax.pipeline.conditioning import tokenize_prompts
from d2g_jax.pipeline.draw import Solution, draw, teacher_programs
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.plan.architectures import MODELS
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.errors import UserError

AGREE = 0.02
"""Largest difference of the two sides' latents over the largest latent, in float32: more is not the same work."""

OF_DIFFUSERS = {"cpu": 1.0, "gpu": 1.3}
"""At least so many times as fast as diffusers, by platform."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What `d2g bench pairs` is asked for.

    Attributes:
      model: a name of `networks.known`, which gets random weights; else a pipeline folder or hub id, with its own.
      prompt: of every image.
      batch: images in a call.
      steps: of DDIM.
      guidance_scale: both halves run above 1.
      dtype: of the networks, one of `networks.DTYPES`; None: float32 on a CPU, bfloat16 elsewhere.
      repeats: rounds of turns.
      torch: whether diffusers' pipeline runs too, where it is installed.
      compile: torch.compile of its UNet; None: on GPUs alone, with max-autotune.
      seed: of random weights and noise.
    """

    model: str = str(WEIGHTS / "pipeline")
    prompt: str = "a bold red seven slanted to the right on navy and white stripes"
    batch: int = 64
    steps: int = 50
    guidance_scale: float = 3.0
    dtype: str | None = None
    repeats: int = 5
    torch: bool = True
    compile: bool | None = None
    seed: int = 0

    def resolved(self) -> Request:
        """The request with this device's defaults; raises `UserError` that names the flag."""
        check_counts(self, "batch", "steps", "repeats")
        SEED.check("--seed", self.seed)
        if self.batch % jax.device_count():
            raise UserError(f"--batch={self.batch} is not a multiple of the {jax.device_count()} devices")
        dtype = self.dtype or default_dtype()
        compute_dtype("--dtype", dtype)  # refuses another
        return dataclasses.replace(self, dtype=dtype, compile=torch_pipeline.compiles(self.compile))


def run(request: Request) -> dict[str, Any]:
    """Measures and returns the report; `value` of a row is images per second.

    Raises `UserError` for a bad request, a folder that is no pipeline, and sides that do not draw the same latents.
    """
    request = request.resolved()
    mesh = meshes.make_mesh()
    pipeline = load(request, mesh)
    height, width, channels = pipeline.latent_shape
    ids = jnp.arange(request.batch, dtype=jnp.uint32)
    drawn = np.asarray(noise.record_noise(request.seed, ids, (channels, height, width)))
    kept: dict[str, np.ndarray] = {}
    candidates = [product_candidate(request.dtype), _ours(request, pipeline, mesh, drawn, kept)]
    if request.torch:
        candidates.append(_diffusers(request, pipeline, drawn, kept))
    rows = time_in_turns(candidates, request.repeats)
    for row in rows[1:]:
        row["value"] = ratio(request.batch, row["seconds"])
    if request.dtype == "float32" and len(kept) == 2:
        check_same(*kept.values())
    return make_report("pairs", dataclasses.asdict(request), rows, bars(request, rows) if request.torch else [])


def load(request: Request, mesh: jax.sharding.Mesh) -> Pipeline:
    """The teacher, stored as `d2g pairs` stores it: float32, whatever it computes in.

    Raises `UserError` for a model that is neither a name, a folder nor a hub id.
    """
    if known(request.model):
        return random_pipeline(request.model, request.dtype, "float32", request.seed, mesh)
    if "/" not in request.model and not is_there(expanded(request.model)):
        raise UserError(f"--model={request.model}: no such folder, and no name; give a folder or {', '.join(MODELS)}")
    return Pipeline.load(request.model, jnp.dtype(request.dtype), mesh)


def check_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Raises `UserError` for latents of two sides that differ by more than `AGREE`."""
    error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if not error <= AGREE:
        raise UserError(f"the two sides draw different latents (by {error:.3g} of the largest): nothing to compare")


def bars(request: Request, rows: list[dict[str, Any]]) -> list[Bar]:
    """The one of this device, for a resolved request; without a figure on a GPU where diffusers is not compiled."""
    _, ours, theirs = rows
    return [torch_pipeline.bar("ours draws", ratio(ours["value"], theirs["value"]), OF_DIFFUSERS, request.compile)]


def _ours(
    request: Request,
    pipeline: Pipeline,
    mesh: jax.sharding.Mesh,
    drawn: np.ndarray,
    kept: dict[str, np.ndarray],
) -> Candidate:
    solution = Solution(steps=request.steps, guidance_scale=request.guidance_scale)
    programs = teacher_programs(pipeline, mesh, solution)
    input_ids = tokenize_prompts(pipeline, [request.prompt] * request.batch)
    placed = meshes.place_batch({"noise": drawn, "ids": input_ids}, mesh)
    encode = Compiled.of(programs.encode, placed["ids"])
    solve = Compiled.of(programs.solve, placed["noise"], encode.results)
    facts = together([encode.facts, solve.facts])
    if reason := does_not_fit(facts.temp_bytes + facts.output_bytes):
        return Candidate("d2g_jax", request.dtype, None, facts, reason)
    compiled = dataclasses.replace(programs, encode=encode.call, solve=solve.call)

    def call() -> np.ndarray:
        (batch,) = draw(compiled, mesh, drawn, input_ids, request.batch, images=False)
        return batch.latents

    return Candidate("d2g_jax", request.dtype, call, facts, describe=lambda latents: keep(kept, "d2g_jax", latents))


def _diffusers(request: Request, pipeline: Pipeline, drawn: np.ndarray, kept: dict[str, np.ndarray]) -> Candidate:
    """diffusers' own class for the pipeline, on the device that JAX uses."""
    if reason := torch_pipeline.alone_missing(pipeline):
        return Candidate("diffusers", request.dtype, None, not_run=reason)
    solution = Solution(steps=request.steps, guidance_scale=request.guidance_scale)
    prompts = [request.prompt] * request.batch
    call = torch_pairs.solver(pipeline, solution, prompts, drawn, request.dtype, compiles=request.compile)

    def describe(latents: np.ndarray) -> dict[str, Any]:
        return {**keep(kept, "diffusers", latents), **torch_pipeline.peak(latents)}

    return Candidate("diffusers", request.dtype, call, describe=describe)


def keep(kept: dict[Any, np.ndarray], side: Any, latents: Any) -> dict[str, Any]:
    """Puts a side's latents aside, for `check_same`; for its row their standard deviation."""
    kept[side] = np.asarray(latents)
    return {"latent_std": float(kept[side].std())}
