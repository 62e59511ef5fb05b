"""Noise schedule, prediction types, the DDIM solver, guidance and the one-step generator, as small pure functions.

Notation: x_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) eps, with ab the cumulative product of 1 - beta ("alphas_cumprod").
All of it runs in float32: at t = T the conversion from eps to x_0 multiplies every error by 13 to 15.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2g_jax.errors import UserError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]
"""(latents (B, h, w, C), timestep ()) -> the network's raw output (B, h, w, C)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A diffusers scheduler folder reduced to what the probability-flow ODE needs.

    Attributes:
      alphas_cumprod: float32 (T,).
      prediction_type: what the network outputs: "epsilon", "v_prediction" or "sample".
      timestep_spacing, steps_offset: how T timesteps are thinned out, with diffusers' meanings.
      set_alpha_to_one: whether the last DDIM step lands on ab = 1 or on ab_0.
    """

    alphas_cumprod: np.ndarray
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, source: str = "scheduler_config.json") -> Schedule:
        """Reads a `scheduler_config.json`; only the schedule is taken, whatever solver class it names.

        Raises `UserError` for a setting that would change the ODE and that is not implemented.
        """
        for key in ("clip_sample", "thresholding"):
            if config.get(key):
                raise UserError(f"{source}: {key}=true is not a deterministic ODE of the latents; set it to false")
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in PREDICTION_TYPES:
            raise UserError(f"{source}: prediction_type={prediction_type!r}; known are {', '.join(PREDICTION_TYPES)}")
        spacing = config.get("timestep_spacing", "leading")
        if spacing not in SPACINGS:
            raise UserError(f"{source}: timestep_spacing={spacing!r}; known are {', '.join(SPACINGS)}")
        alphas_cumprod = np.cumprod(1.0 - _betas(config, source))
        if config.get("rescale_betas_zero_snr"):
            alphas_cumprod = _zero_terminal_snr(alphas_cumprod)
        return cls(
            alphas_cumprod.astype(np.float32),
            prediction_type,
            spacing,
            int(config.get("steps_offset", 0)),
            bool(config.get("set_alpha_to_one", True)),
        )

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def timesteps(self, num_steps: int) -> np.ndarray:
        """int32 (num_steps,), falling; equal to diffusers' `DDIMScheduler.set_timesteps`.

        Raises `UserError` when num_steps is not in 1..T.
        """
        total = self.num_train_timesteps
        if not 1 <= num_steps <= total:
            raise UserError(f"steps={num_steps} is out of range: the schedule has 1 to {total} steps")
        if self.timestep_spacing == "leading":
            steps = (np.arange(num_steps) * (total // num_steps))[::-1] + self.steps_offset
        elif self.timestep_spacing == "trailing":
            steps = np.round(np.arange(total, 0, -total / num_steps))[:num_steps] - 1
        else:
            steps = np.round(np.linspace(0, total - 1, num_steps))[::-1]
        return np.minimum(steps, total - 1).astype(np.int32)

    def first_timestep(self, num_steps: int) -> int:
        """The timestep at which a `num_steps` solver sees pure noise: the generator's timestep."""
        return int(self.timesteps(num_steps)[0])


def _betas(config: Mapping[str, Any], source: str) -> np.ndarray:
    """float64 (T,) betas as in diffusers' `beta_schedule`."""
    if config.get("trained_betas") is not None:
        return np.asarray(config["trained_betas"], np.float64)
    total = int(config.get("num_train_timesteps", 1000))
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    name = config.get("beta_schedule", "linear")
    if name == "linear":
        return np.linspace(start, end, total)
    if name == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, total) ** 2
    if name == "squaredcos_cap_v2":
        bar = np.cos((np.arange(total + 1) / total + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    raise UserError(f"{source}: beta_schedule={name!r}; known are linear, scaled_linear, squaredcos_cap_v2")


def _zero_terminal_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
    """Shifts and scales sqrt(ab) so that it ends at 0 and keeps its first value (arXiv 2305.08891, algorithm 1)."""
    root = np.sqrt(alphas_cumprod)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def to_x0_and_noise(
    prediction_type: str, output: jax.Array, latents: jax.Array, alpha_bar: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The network's raw output as an estimate of (x_0, eps), both float32.

    `alpha_bar` broadcasts against latents (B, h, w, C).
    """
    output, latents = output.astype(jnp.float32), latents.astype(jnp.float32)
    signal, sigma = jnp.sqrt(alpha_bar), jnp.sqrt(1.0 - alpha_bar)
    if prediction_type == "epsilon":
        return (latents - sigma * output) / signal, output
    if prediction_type == "sample":
        return output, (latents - signal * output) / sigma
    return signal * latents - sigma * output, signal * output + sigma * latents


def training_target(prediction_type: str, x0: jax.Array, noise: jax.Array, alpha_bar: jax.Array) -> jax.Array:
    """What the network is trained to output for x_t made from (x_0, eps)."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x0
    return jnp.sqrt(alpha_bar) * noise - jnp.sqrt(1.0 - alpha_bar) * x0


def add_noise(x0: jax.Array, noise: jax.Array, alpha_bar: jax.Array) -> jax.Array:
    """x_t of the forward process; `alpha_bar` broadcasts against x0 (B, h, w, C)."""
    return jnp.sqrt(alpha_bar) * x0 + jnp.sqrt(1.0 - alpha_bar) * noise


def guided(
    unet: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    text: jax.Array,
    negative_text: jax.Array,
    guidance_scale: float,
) -> Denoiser:
    """Classifier-free guidance (arXiv 2207.12598) with both halves in one network call.

    `unet(latents, timesteps, text)` takes a batch; text and negative_text are (B, L, D). At guidance_scale <= 1 only
    the conditional half runs, as in diffusers.
    """
    if guidance_scale <= 1.0:
        return lambda latents, t: unet(latents, jnp.broadcast_to(t, latents.shape[:1]), text)
    both_texts = jnp.concatenate([negative_text, text])

    def denoise(latents: jax.Array, t: jax.Array) -> jax.Array:
        twice = jnp.concatenate([latents, latents])  # (2B, h, w, C)
        output = unet(twice, jnp.broadcast_to(t, twice.shape[:1]), both_texts).astype(jnp.float32)
        unconditional, conditional = jnp.split(output, 2)
        return unconditional + guidance_scale * (conditional - unconditional)

    return denoise


def ddim(denoise: Denoiser, schedule: Schedule, num_steps: int, noise: jax.Array) -> jax.Array:
    """The deterministic DDIM solution (arXiv 2010.02502, eq. 12 with sigma = 0) that starts at `noise`.

    Returns float32 scaled latents of noise's shape (B, h, w, C). Equal to diffusers' `DDIMScheduler` with eta = 0.
    """
    timesteps = schedule.timesteps(num_steps)
    previous = timesteps - schedule.num_train_timesteps // num_steps
    alphas = schedule.alphas_cumprod
    final = np.float32(1.0) if schedule.set_alpha_to_one else alphas[0]
    alpha_now, alpha_next = alphas[timesteps], np.where(previous >= 0, alphas[np.maximum(previous, 0)], final)

    def step(latents: jax.Array, inputs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        t, now, then = inputs
        x0, eps = to_x0_and_noise(schedule.prediction_type, denoise(latents, t), latents, now)
        return jnp.sqrt(then) * x0 + jnp.sqrt(1.0 - then) * eps, None

    inputs = (jnp.asarray(timesteps), jnp.asarray(alpha_now), jnp.asarray(alpha_next))
    return jax.lax.scan(step, noise.astype(jnp.float32), inputs)[0]


def one_step(denoise: Denoiser, schedule: Schedule, timestep: int, noise: jax.Array) -> jax.Array:
    """The generator: noise (B, h, w, C) to x_0 in one network call at a fixed timestep; float32.

    With the teacher's weights this is its own first DDIM step taken all the way to x_0.
    """
    output = denoise(noise, jnp.asarray(timestep, jnp.int32))
    return to_x0_and_noise(schedule.prediction_type, output, noise, schedule.alphas_cumprod[timestep])[0]
