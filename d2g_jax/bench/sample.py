"""`d2g bench sample`: one-step sampling, side by side with diffusers' modules that have the same weights.

Token ids to images on the host, and text towers, UNet and VAE each by itself, by the very programs of `d2g sample`. All
weights are random and of full size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from d2g_jax.bench import torch_pipeline
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
from d2g_jax.bench.networks import default_dtype, random_input_ids, random_pipeline
from d2g_jax.bench.pairs import check_same, keep
from d2g_jax.bench.programs import Compiled, together
from d2g_jax.config.configuration import compute_dtype
from d2g_jax.diffusion import noise
from d2g_jax.diffusion.schedule import Schedule
from d2g_jax.diffusion.systems import OneStep
from d2g_jax.inputs.numbers import SEED
from d2g_jax.pipeline.draw import Programs, one_step_programs
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.progress import Progress

PARTS = ("text", "unet", "vae", "all")
"""Token ids to conditioning; that and noise to latents; those to uint8 images; all three, the images on the host."""

OF_DIFFUSERS = {"cpu": 1.0, "gpu": 1.2}
"""At least so many times as fast as diffusers, by platform."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What `d2g bench sample` is asked for.

    Attributes:
      model: see `networks.random_pipeline`.
      batches: images in a call; each is measured. None: one a device, and 8 on accelerators.
      dtype: of the networks and of their kernels; None: float32 on a CPU, bfloat16 elsewhere.
      parts: of `PARTS`, what is timed.
      repeats: rounds of turns.
      torch: whether diffusers' modules run too, where they are installed.
      compile: torch.compile of those; None: on GPUs alone, with max-autotune.
      seed: of weights, noise and token ids.
    """

    model: str = "sd15"
    batches: tuple[int, ...] | None = None
    dtype: str | None = None
    parts: tuple[str, ...] = PARTS
    repeats: int = 5
    torch: bool = True
    compile: bool | None = None
    seed: int = 0

    def resolved(self) -> Request:
        """The request with this device's defaults; raises `UserError` that names the flag."""
        accelerator = jax.default_backend() != "cpu"
        devices = jax.device_count()
        default = (devices, 8 * devices) if accelerator else (devices,)
        batches = default if self.batches is None else self.batches
        dtype = self.dtype or default_dtype()
        compute_dtype("--dtype", dtype)  # refuses another
        if not batches or min(batches) < 1 or any(batch % devices for batch in batches):
            listed = ",".join(map(str, batches))
            raise UserError(f"--batches={listed}: give numbers that are multiples of the {devices} devices")
        check_counts(self, "repeats")
        SEED.check("--seed", self.seed)
        if not self.parts or not set(self.parts) <= set(PARTS):
            raise UserError(f"--parts={','.join(self.parts)}: give some of {', '.join(PARTS)}")
        compiles = torch_pipeline.compiles(self.compile)
        return dataclasses.replace(self, batches=batches, dtype=dtype, compile=compiles)


def run(request: Request) -> dict[str, Any]:
    """Measures and returns the report; `value` of a row is images per second.

    Raises `UserError` for a bad request, an unknown model, and, in float32, sides that do not draw the same latents.
    """
    request = request.resolved()
    mesh = meshes.make_mesh()
    pipeline = random_pipeline(request.model, request.dtype, request.dtype, request.seed, mesh)
    timestep = Schedule.from_config(pipeline.scheduler).num_train_timesteps - 1
    programs = one_step_programs(pipeline, pipeline.params["unet"], OneStep(timestep), mesh)
    theirs, reason = None, torch_pipeline.left_out(pipeline) if request.torch else None
    if request.torch and reason is None:
        theirs = torch_pipeline.TorchPipeline(pipeline, request.dtype, timestep, compiles=request.compile)
    rows, latents = [(None, None, product_candidate(request.dtype))], {}
    for batch in request.batches:
        inputs = _inputs(request, pipeline, batch)
        with Progress(f"compile for {batch}", 1, "batches") as progress:
            ours = _ours(request, programs, mesh, inputs, latents)
            progress.advance(1)
        rows += [(batch, part, ours[part]) for part in request.parts]
        if request.torch:
            others = _torch(request, theirs, reason, inputs, latents)
            rows += [(batch, part, others[part]) for part in request.parts]
    measured = time_in_turns([candidate for _, _, candidate in rows], request.repeats)
    for (batch, part, _), row in zip(rows, measured, strict=True):
        row.update(batch=batch, part=part)
        row["value"] = ratio(batch, row["seconds"]) if batch else None
    if request.dtype == "float32":
        _check_all(latents)
    return make_report("sample", dataclasses.asdict(request), measured, list(_bars(request, measured)))


def _inputs(request: Request, pipeline: Pipeline, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """On the host: token ids (B, T L), and noise (B, C, h, w)."""
    height, width, channels = pipeline.latent_shape
    ids = np.arange(batch, dtype=np.uint32)
    drawn = np.asarray(noise.record_noise(request.seed, ids, (channels, height, width)))
    return random_input_ids(pipeline, batch, request.seed), drawn


def _name(part: str, batch: int, side: str = "") -> str:
    return f"{part} x{batch}" + (f" ({side})" if side else "")


def _ours(
    request: Request,
    programs: Programs,
    mesh: jax.sharding.Mesh,
    inputs: tuple[np.ndarray, np.ndarray],
    kept: dict[Any, np.ndarray],
) -> dict[str, Candidate]:
    """A candidate for each of `PARTS`; the UNet's latents are kept under (batch, "ours")."""
    input_ids, drawn = inputs
    batch, placed = len(drawn), meshes.place_batch({"noise": drawn, "ids": input_ids}, mesh)
    text = Compiled.of(programs.encode, placed["ids"])
    unet = Compiled.of(programs.solve, placed["noise"], text.results)
    vae = Compiled.of(programs.decode, unet.results)
    parts = {"text": text, "unet": unet, "vae": vae}
    refused = does_not_fit(max(part.facts.temp_bytes + part.facts.output_bytes for part in parts.values()))
    condition = None if refused else jax.block_until_ready(text.call(placed["ids"]))
    latents = jax.device_put(drawn, unet.results.sharding)  # of the right shape

    def everything() -> np.ndarray:
        ids = meshes.place_batch(input_ids, mesh)
        return np.asarray(vae.call(unet.call(placed["noise"], text.call(ids))).images)

    calls: dict[str, Callable[[], Any]] = {
        "text": lambda: jax.block_until_ready(text.call(placed["ids"])),
        "unet": lambda: jax.block_until_ready(unet.call(placed["noise"], condition)),
        "vae": lambda: jax.block_until_ready(vae.call(latents)),
        "all": everything,
    }
    facts = {name: part.facts for name, part in parts.items()} | {"all": together([p.facts for p in parts.values()])}
    describe = {"unet": functools.partial(keep, kept, (batch, "ours"))}
    return {
        part: Candidate(
            _name(part, batch), request.dtype, None if refused else call, facts[part], refused,
            describe.get(part, lambda result: {}),
        )
        for part, call in calls.items()
    }  # fmt: skip


def _torch(
    request: Request,
    theirs: torch_pipeline.TorchPipeline | None,
    reason: str | None,
    inputs: tuple[np.ndarray, np.ndarray],
    kept: dict[Any, np.ndarray],
) -> dict[str, Candidate]:
    """The same candidates of diffusers' modules; the UNet's latents are kept under (batch, "torch")."""
    batch = len(inputs[1])
    if theirs is None:
        return {p: Candidate(_name(p, batch, "torch"), request.dtype, None, not_run=reason) for p in PARTS}
    calls: dict[str, Callable[[], Any]] = theirs.calls(*inputs)
    candidates = {
        part: Candidate(_name(part, batch, "torch"), request.dtype, call, describe=torch_pipeline.peak)
        for part, call in calls.items()
    }

    def describe(result: Any) -> dict[str, Any]:
        return {**keep(kept, (batch, "torch"), result.float().cpu().numpy()), **torch_pipeline.peak(result)}

    return {**candidates, "unet": dataclasses.replace(candidates["unet"], describe=describe)}


def _check_all(latents: dict[Any, np.ndarray]) -> None:
    for (batch, side), drawn in latents.items():
        if side == "ours" and (batch, "torch") in latents:
            check_same(drawn, latents[batch, "torch"])


def _bars(request: Request, rows: list[dict[str, Any]]) -> Iterator[Bar]:
    by_name = {row["name"]: row for row in rows}
    backend, first, last = jax.default_backend(), min(request.batches), max(request.batches)

    def seconds(part: str, batch: int, side: str = "") -> float | None:
        return by_name.get(_name(part, batch, side), {}).get("seconds")

    for batch in request.batches:
        for part in ("all", "unet"):
            if request.torch and part in request.parts:
                faster = ratio(seconds(part, batch, "torch"), seconds(part, batch))
                yield torch_pipeline.bar(f"{part} x{batch}:", faster, OF_DIFFUSERS, request.compile)
    if backend != "cpu" and "unet" in request.parts:
        share = by_name[_name("unet", last)]["share_of_peak"]
        yield Bar.at_least(f"unet x{last}: at least half of the peak", share, 0.5)
    part = request.parts[-1]
    if last > first:
        growth = ratio(ratio(seconds(part, last), last), ratio(seconds(part, first), first))
        yield Bar.at_most(f"{part}: an image of {last} takes at most 1.05 times as long as of {first}", growth, 1.05)
