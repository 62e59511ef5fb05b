"""From prompts and noise to latents and images: the compiled programs that pairs, sampling and evaluation share."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from d2g_jax.diffusion import solvers
from d2g_jax.diffusion.schedule import Schedule, guided, student_timestep
from d2g_jax.diffusion.systems import OneStep, guidance_embedding
from d2g_jax.inputs import numbers
from d2g_jax.inputs.text import check_whole
from d2g_jax.models import vae
from d2g_jax.models.network import Network, Params
from d2g_jax.pipeline.conditioning import Conditioning, encode_negative, encode_text, size_ids
from d2g_jax.pipeline.folder import RECTIFIED_FLOW, Decoded, Pipeline, decode, quantise
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.compilation import compilation
from d2g_jax.runtime.errors import UserError

_GUIDANCE = numbers.Range(-100, 100)

_FEW_STEPS = ("LCMScheduler", "TCDScheduler")
_OTHER_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


@dataclasses.dataclass(frozen=True)
class Solution:
    """How a teacher is solved.

    Attributes:
      steps: of the solver; Heun calls the network 2 steps - 1 times.
      guidance_scale: classifier-free guidance; at 1 or less only the conditional half runs.
      guidance_rescale: phi of arXiv 2305.08891, section 3.4; 0 is off.
      negative_prompt: the other half of guidance.
      solver: a name of `solvers.SOLVERS`.
      spacing: leading, trailing or linspace; None is the pipeline's own.
    """

    steps: int = 50
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    negative_prompt: str = ""
    solver: str = "ddim"
    spacing: str | None = None

    def __post_init__(self) -> None:
        """Raises `UserError` for values that no solution can have."""
        numbers.COUNT.check("steps", self.steps)
        _GUIDANCE.check("guidance_scale", self.guidance_scale)
        numbers.SHARE.check("guidance_rescale", self.guidance_rescale)
        if not isinstance(self.negative_prompt, str):
            raise UserError(f"negative_prompt={self.negative_prompt!r}; give one text, empty for none")
        check_whole(self.negative_prompt, "negative_prompt")

    @classmethod
    def default(cls, pipeline: Pipeline) -> Solution:
        """Of a teacher that nothing is said of: one of images is not guided, and EDM's is solved as they do."""
        if pipeline.classes is None:
            return cls()
        edm = Schedule.from_config(pipeline.scheduler).karras is not None
        return cls(steps=18, solver="heun", guidance_scale=1.0) if edm else cls(guidance_scale=1.0)

    def schedule(self, pipeline: Pipeline) -> Schedule:
        """The pipeline's schedule; raises `UserError` for a spacing or for noise levels that are not implemented.

        A file without a spacing means leading to diffusers' DDIM and linspace to its other solvers; so it does here.
        """
        check_teacher(pipeline)
        if pipeline.classes is not None and self.guidance_scale > 1.0:
            raise UserError(
                f"guidance_scale={self.guidance_scale}: {pipeline.folder} has no empty prompt to be guided from; give 1"
            )
        source = str(pipeline.folder / "scheduler" / "scheduler_config.json")
        config = {"timestep_spacing": "leading" if self.solver == "ddim" else "linspace", **pipeline.scheduler}
        if self.spacing is not None:
            config["timestep_spacing"] = self.spacing
        for key in _OTHER_SIGMAS:
            if self.solver != "ddim" and config.get(key):
                raise UserError(f"{source}: {key}=true is not implemented; set it to false or take the solver ddim")
        schedule = Schedule.from_config(config, source=source)
        if schedule.karras is not None and (self.solver == "ddim" or self.spacing is not None):
            raise UserError(f"{source}: has EDM's levels; take solver=heun, euler or dpmpp_2m and leave out spacing")
        if (
            self.solver == "ddim"
            and schedule.timestep_spacing == "linspace"
            and self.steps < schedule.num_train_timesteps
        ):
            warnings.warn(
                f"{source}: ddim with linspace spacing goes as diffusers' does, whose steps are wider than those "
                "between its timesteps: its images are worse; take leading or trailing",
                stacklevel=2,
            )
        return schedule

    @property
    def network_calls(self) -> int:
        """UNet evaluations per image, both halves of guidance counted."""
        halves = 2 if self.guidance_scale > 1.0 else 1
        return halves * solvers.network_calls(self.solver, self.steps)


def check_teacher(pipeline: Pipeline) -> None:
    """Raises `UserError` for a pipeline that draws in few steps by a rule of its own and is no teacher to be solved."""
    if pipeline.index["_class_name"] == RECTIFIED_FLOW:
        raise UserError(f"{pipeline.folder}: a {RECTIFIED_FLOW}, no teacher to be solved; draw with system=instaflow")
    if student_timestep(pipeline.scheduler) is not None:
        raise UserError(
            f"{pipeline.folder}: a one-step student, no teacher to be solved; give the one it was made from"
        )
    if pipeline.unet.config.time_cond_proj_dim is not None:
        raise UserError(
            f"{pipeline.folder}: its UNet has a time_cond_proj_dim, as latent consistency models have, and is no "
            "teacher to be solved; draw with system=lcm, distil the model that it was made from"
        )
    if (name := pipeline.scheduler.get("_class_name")) in _FEW_STEPS:
        raise UserError(
            f"{pipeline.folder}: its scheduler is {name}, of models that were distilled to few steps, no teacher to "
            "be solved; draw with --system, or where it is a teacher name DDIMScheduler in its scheduler_config.json"
        )


@dataclasses.dataclass(frozen=True)
class Programs:
    """Compiled on first use, over the mesh; every array has the batch in front.

    But for a tiled `decode` each is a `functools.partial` of a jitted function with its parameters: what has to know of
    the compiled programs lowers that.

    Attributes:
      encode: token ids (B, T L) to `Conditioning`.
      solve: float32 noise (B, C, h, w) and conditioning to float32 scaled latents (B, C, h, w).
      decode: scaled latents (B, C, h, w) to uint8 images (B, H, W, 3) and whether they were finite.
      network_calls: UNet evaluations per image.
    """

    encode: Callable[[jax.Array], Conditioning]
    solve: Callable[[jax.Array, Conditioning], jax.Array]
    decode: Callable[[jax.Array], Decoded]
    network_calls: int


class Drawn(NamedTuple):
    """One batch: scaled latents (B, C, h, w), and uint8 images (B, H, W, 3) if they were asked for."""

    latents: np.ndarray
    images: np.ndarray | None


def check_finite(latents: np.ndarray, decoded: Decoded | None, name: object, prompts: Sequence[str]) -> None:
    """Raises `UserError` for what is not finite: it would be a black or white image, get scores, and be served.

    Latents (B, C, h, w) and what they were decoded to, both on the host, of `prompts`.
    """
    finite = np.isfinite(latents).reshape(len(latents), -1).all(axis=1)
    finite = finite if decoded is None else finite & decoded.finite
    if not finite.all():
        first = prompts[int(np.argmin(finite))] if len(prompts) else ""
        raise UserError(
            f"{name}: {np.count_nonzero(~finite)} of {len(latents)} images are not finite, the first for {first!r}; "
            "check its weights, or take the dtype float32"
        )


def teacher_programs(
    pipeline: Pipeline,
    mesh: jax.sharding.Mesh,
    solution: Solution,
    size: tuple[int, int] | None = None,
    *,
    tiled: bool = False,
) -> Programs:
    """A pipeline solved in steps; `size` is (height, width) of the images for SDXL's conditioning.

    `tiled` decodes large images piece by piece (`vae.decode_tiled`).

    Raises `UserError` for a solver or a number of steps that the schedule does not have.
    """
    if solution.solver not in solvers.SOLVERS:
        raise UserError(f"solver {solution.solver!r} is unknown; choose one of {', '.join(solvers.SOLVERS)}")
    schedule, solver = solution.schedule(pipeline), solvers.SOLVERS[solution.solver]
    solvers.first_timestep(solution.solver, schedule, solution.steps)  # refuses an impossible number before compiling
    towers, unet = (meshes.place(params, mesh) for params in (pipeline.text_params, pipeline.params["unet"]))
    sizes = size_ids(pipeline, size)

    @jax.jit
    def solve(towers: dict[str, Params], unet: Params, drawn: jax.Array, condition: Conditioning) -> jax.Array:
        negative = None
        if solution.guidance_scale > 1.0:
            one = encode_negative(pipeline, towers, solution.negative_prompt, sizes)
            spread = lambda row, like: jnp.broadcast_to(row, like.shape).astype(like.dtype)  # noqa: E731
            negative = jax.tree.map(spread, one, condition)
        denoise = guided(
            lambda x, t, c: pipeline.unet.apply(unet, x, t, *c),
            condition,
            negative,
            solution.guidance_scale,
            solution.guidance_rescale,
        )
        with meshes.traced_for(mesh):
            latents = solver(denoise, schedule, solution.steps, _to_nhwc(drawn))
        return _to_nchw(latents)

    return Programs(
        _encoder(pipeline, mesh, sizes),
        functools.partial(solve, towers, unet),
        _tiled_decoder(pipeline, mesh) if tiled else _decoder(pipeline, mesh),
        solution.network_calls,
    )


def one_step_programs(
    pipeline: Pipeline,
    unet: Params,
    system: OneStep,
    mesh: jax.sharding.Mesh,
    size: tuple[int, int] | None = None,
    *,
    tiled: bool = False,
) -> Programs:
    """A one-step generator of any kind: `unet` are its parameters, `system` how they are called.

    Raises `UserError` for a system that does not go with the schedule or with the UNet.
    """
    unet = meshes.place(unet, mesh)
    solve = _one_step(pipeline.unet, json.dumps(pipeline.scheduler), system, mesh)
    return Programs(
        _encoder(pipeline, mesh, size_ids(pipeline, size)),
        functools.partial(solve, unet),
        _tiled_decoder(pipeline, mesh) if tiled else _decoder(pipeline, mesh),
        1,
    )


@functools.lru_cache(maxsize=1)
def _one_step(network: Network, scheduler: str, system: OneStep, mesh: jax.sharding.Mesh) -> Callable[..., jax.Array]:
    """(parameters, noise, conditioning) to latents: of students that differ in parameters only, compiled once.

    Raises as `one_step_programs` does.
    """
    schedule, embedding_size = Schedule.from_config(json.loads(scheduler)), network.config.time_cond_proj_dim
    system.check_unet(embedding_size)
    system.schedule(schedule)  # refuses a wrong timestep before anything compiles

    @jax.jit
    def solve(unet: Params, drawn: jax.Array, condition: Conditioning) -> jax.Array:
        def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
            weight = system.guidance_scale
            embedded = () if weight is None else (guidance_embedding(weight, embedding_size, len(x)),)
            return network.apply(unet, x, jnp.broadcast_to(t, x.shape[:1]), *condition, *embedded)

        with meshes.traced_for(mesh):
            latents = system.generate(denoise, schedule, _to_nhwc(drawn))
        return _to_nchw(latents)

    return solve


def _encoder(
    pipeline: Pipeline, mesh: jax.sharding.Mesh, sizes: tuple[int, ...]
) -> Callable[[jax.Array], Conditioning]:
    towers = meshes.place(pipeline.text_params, mesh)
    # said outright, so that `solve` is one program for what was encoded just now and for what comes from the host
    by_batch = jax.sharding.NamedSharding(mesh, meshes.BATCH)
    encode = jax.jit(lambda towers, ids: encode_text(pipeline, towers, ids, sizes), out_shardings=by_batch)
    return functools.partial(encode, towers)


def _decoder(pipeline: Pipeline, mesh: jax.sharding.Mesh) -> Callable[[jax.Array], Decoded]:
    program = jax.jit(lambda params, latents: decode(pipeline, params, _to_nhwc(latents)))
    params = meshes.place({"vae": pipeline.params["vae"]}, mesh)
    return functools.partial(program, params)


def _tiled_decoder(pipeline: Pipeline, mesh: jax.sharding.Mesh) -> Callable[[jax.Array], Decoded]:
    config, params = pipeline.vae.config, meshes.place(pipeline.params["vae"], mesh)
    program = jax.jit(lambda params, unscaled: pipeline.vae.apply(params, unscaled, method="decode"))

    def decode_in_tiles(latents: jax.Array) -> Decoded:
        unscaled = vae.unscale_latents(config, _to_nhwc(latents))
        return quantise(vae.decode_tiled(config, lambda tile: program(params, tile), unscaled))

    return decode_in_tiles


def draw(
    programs: Programs,
    mesh: jax.sharding.Mesh,
    drawn: np.ndarray,
    input_ids: np.ndarray,
    batch_size: int,
    *,
    images: bool,
    seconds: dict[str, float] | None = None,
    name: object = "the model",
    prompts: Sequence[str] = (),
) -> Iterator[Drawn]:
    """Batch by batch in order; the last one is padded on the devices and cut on the host.

    Raises `UserError` as `check_finite` does.

    Args:
      drawn: float32 noise (N, C, h, w).
      input_ids: int32 (N, T L).
      batch_size: a multiple of the mesh's devices.
      images: whether to decode.
      seconds: if given, time is added to its "text", "unet" and "vae", each stage waited for, and what of them was
        compilation to its "compile" instead.
      name, prompts: of the model, and N: for messages.
    """

    def timed(name: str, stage: Callable[..., Any], *arguments: Any) -> Any:
        if seconds is None:
            return stage(*arguments)
        start = time.monotonic()
        with compilation() as compiling:
            value = jax.block_until_ready(stage(*arguments))
        own = time.monotonic() - start - compiling.seconds
        for key, spent in ((name, own), ("compile", compiling.seconds)):
            seconds[key] = seconds.get(key, 0.0) + spent
        return value

    for first in range(0, len(drawn), batch_size):
        part = slice(first, first + batch_size)
        count = len(drawn[part])
        batch = meshes.place_batch(
            {"noise": padded(drawn[part], batch_size), "ids": padded(input_ids[part], batch_size)}, mesh
        )
        condition = timed("text", programs.encode, batch["ids"])
        latents = timed("unet", programs.solve, batch["noise"], condition)
        decoded = timed("vae", programs.decode, latents) if images else None
        latents, decoded = _first(jax.device_get((latents, decoded)), count)
        check_finite(latents, decoded, name, prompts[part])
        yield Drawn(latents, decoded.images if images else None)


def decode_all(pipeline: Pipeline, mesh: jax.sharding.Mesh, latents: np.ndarray, batch_size: int) -> np.ndarray:
    """Scaled latents (N, C, h, w) to uint8 images (N, H, W, 3). Raises `UserError` as `check_finite` does."""
    program, images = _decoder(pipeline, mesh), []
    for first in range(0, len(latents), batch_size):
        part = latents[first : first + batch_size]
        batch = meshes.place_batch({"latents": padded(part, batch_size)}, mesh)
        decoded = _first(jax.device_get(program(batch["latents"])), len(part))
        check_finite(part, decoded, pipeline.folder / "vae", ())
        images.append(decoded.images)
    return np.concatenate(images)


def _first(tree: Any, count: int) -> Any:
    return jax.tree.map(lambda x: x[:count], tree)


def padded(x: np.ndarray, count: int) -> np.ndarray:
    """`x` with its last row repeated up to `count` rows: one program for every batch."""
    return np.concatenate([x, np.repeat(x[-1:], count - len(x), axis=0)])


def _to_nhwc(x: jax.Array) -> jax.Array:
    return jnp.transpose(x, (0, 2, 3, 1))


def _to_nchw(x: jax.Array) -> jax.Array:
    return jnp.transpose(x, (0, 3, 1, 2))
