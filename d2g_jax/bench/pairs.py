"""`d2g bench pairs`: the teacher's solutions, side by side with diffusers' own pipeline on the same folder.

In one run and in turns: prompts and noise to latents by the programs of `d2g pairs`, and by diffusers' class for the
folder with the same steps, guidance, batch, precision and noise. Nothing is decoded.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2g_jax import mesh as meshes
from d2g_jax import noise
from d2g_jax.bench.measure import Bar, Candidate, Facts, make_report, product_candidate, ratio, time_in_turns
from d2g_jax.bench.networks import check_dtype
from d2g_jax.conditioning import tokenize_prompts
from d2g_jax.draw import Solution, draw, teacher_programs
from d2g_jax.errors import UserError
from d2g_jax.pairs.estimate import unet_flops
from d2g_jax.pipeline import Pipeline

AGREE = 0.02
"""Largest difference of the two sides' latents over the largest latent, in float32: more is not the same work."""


@dataclasses.dataclass(frozen=True)
class PairsRequest:
    """What `d2g bench pairs` is asked for.

    Attributes:
      model: a pipeline folder or hub id.
      prompt: of every image.
      batch: images in a call.
      steps: of DDIM.
      guidance_scale: both halves run above 1.
      dtype: of the networks, one of `networks.DTYPES`.
      repeats: rounds of turns.
      compile: torch.compile of diffusers' UNet; on GPUs max-autotune.
    """

    model: str
    prompt: str = "a bold handwritten seven slanted to the right"
    batch: int = 64
    steps: int = 50
    guidance_scale: float = 3.0
    dtype: str = "float32"
    repeats: int = 3
    compile: bool = False

    def check(self) -> None:
        """Raises `UserError` that names the flag."""
        for flag in ("batch", "steps", "repeats"):
            if getattr(self, flag) < 1:
                raise UserError(f"--{flag}={getattr(self, flag)}: give 1 or more")
        if self.batch % jax.device_count():
            raise UserError(f"--batch={self.batch} is not a multiple of the {jax.device_count()} devices")
        check_dtype(self.dtype)


def run_pairs(request: PairsRequest) -> dict[str, Any]:
    """Measures and returns the report; `value` of a row is images per second.

    Raises `UserError` for a bad request, a folder that is no pipeline, and sides that do not draw the same latents.
    """
    request.check()
    mesh = meshes.make_mesh()
    pipeline = Pipeline.load(request.model, jnp.dtype(request.dtype), mesh)
    height, width, channels = pipeline.latent_shape
    ids = jnp.arange(request.batch, dtype=jnp.uint32)
    drawn = np.asarray(noise.record_noise(0, ids, (channels, height, width)))
    drawn_latents: dict[str, np.ndarray] = {}
    candidates = [
        product_candidate(request.dtype),
        _ours(request, pipeline, mesh, drawn, drawn_latents),
        _diffusers(request, pipeline, drawn, drawn_latents),
    ]
    rows = time_in_turns(candidates, request.repeats)
    for row in rows[1:]:
        row["value"] = request.batch / row["seconds"] if row["seconds"] else None
    if request.dtype == "float32" and len(drawn_latents) == 2:
        check_same(*drawn_latents.values())
    bars = [Bar.at_least("ours draws at least as fast as diffusers", ratio(rows[1]["value"], rows[2]["value"]), 1.0)]
    return make_report("pairs", dataclasses.asdict(request), rows, bars)


def check_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Raises `UserError` for latents of two sides that differ by more than `AGREE`."""
    error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if not error <= AGREE:
        raise UserError(f"the two sides draw different latents (by {error:.3g} of the largest): nothing to compare")


def _ours(
    request: PairsRequest,
    pipeline: Pipeline,
    mesh: jax.sharding.Mesh,
    drawn: np.ndarray,
    kept: dict[str, np.ndarray],
) -> Candidate:
    solution = Solution(steps=request.steps, guidance_scale=request.guidance_scale)
    programs = teacher_programs(pipeline, mesh, solution)
    input_ids = tokenize_prompts(pipeline, [request.prompt] * request.batch)

    def call() -> np.ndarray:
        (batch,) = draw(programs, mesh, drawn, input_ids, request.batch, images=False)
        kept["d2g_jax"] = batch.latents
        return batch.latents

    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    network = programs.network_calls * unet_flops(pipeline) * request.batch
    return Candidate("d2g_jax", request.dtype, call, Facts(seconds, None, drawn.nbytes, network))


def _diffusers(request: PairsRequest, pipeline: Pipeline, drawn: np.ndarray, kept: dict[str, np.ndarray]) -> Candidate:
    """diffusers' own class for the folder, on the device that JAX uses."""
    missing = [name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None]
    if missing:
        return Candidate("diffusers", request.dtype, None, not_run=f"{' and '.join(missing)} not installed")
    import diffusers
    import torch

    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        return Candidate("diffusers", request.dtype, None, not_run="this torch sees no GPU, JAX does")
    device = "cuda" if on_gpu else "cpu"
    theirs = diffusers.DiffusionPipeline.from_pretrained(
        pipeline.folder, dtype=getattr(torch, request.dtype), low_cpu_mem_usage=False
    )
    theirs.to(device)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    if request.compile:
        theirs.unet = torch.compile(theirs.unet, mode="max-autotune" if on_gpu else "default")
    latents = torch.from_numpy(drawn.copy()).to(device, getattr(torch, request.dtype))

    def call() -> np.ndarray:
        with torch.inference_mode():
            result = theirs(
                [request.prompt] * request.batch,
                num_inference_steps=request.steps,
                guidance_scale=request.guidance_scale,
                latents=latents,
                output_type="latent",
            ).images
            kept["diffusers"] = result.float().cpu().numpy()  # waits for the device
        return kept["diffusers"]

    return Candidate("diffusers", request.dtype, call)
