"""Noise schedule, prediction types, guidance and the one-step generator, as small pure functions.

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

from d2g_jax.diffusion.karras import LEVELS, SIGMA_DATA, TIME_SCALES, Karras
from d2g_jax.inputs.numbers import AMOUNT, COUNT, SHARE, Range
from d2g_jax.runtime.errors import UserError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
EDM = "edm"
"""What a network of EDM predicts; with a sigma_data of 1 it would be v-prediction with the sign turned."""
_BETA_KEYS = ("beta_schedule", "beta_start", "beta_end", "trained_betas")
_CLASSES = (
    "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler",
    "LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler",
    "SASolverScheduler", "LCMScheduler", "TCDScheduler",
)  # fmt: skip
"""diffusers' schedulers that thin out a schedule of betas; whatever they do with it, the schedule is the same."""
DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
    "trained_betas": None, "prediction_type": "epsilon", "rescale_betas_zero_snr": False,
    "timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True,
}  # fmt: skip
"""All that is read of a scheduler's config for its schedule, and what a file without it means to diffusers."""
STUDENT = "_d2g_timestep"
"""Key of a scheduler's config that our export writes: the timestep of the student's one call."""
SPACINGS = ("leading", "trailing", "linspace")

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]
"""(latents (B, h, w, C), timestep () int32 or float32) -> the network's raw output (B, h, w, C)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A diffusers scheduler folder reduced to what the probability-flow ODE needs.

    Attributes:
      alphas_cumprod: float32 (T,).
      prediction_type: what the network outputs: "epsilon", "v_prediction" or "sample".
      timestep_spacing, steps_offset: how T timesteps are thinned out, with diffusers' meanings.
      set_alpha_to_one: whether the last DDIM step lands on ab = 1 or on ab_0.
      karras: EDM's levels, of which `alphas_cumprod` is the table; None for all others.

    Raises `UserError` for "epsilon" with zero terminal SNR: x_T is then all noise, and x_0 = (x_T - eps) / 0.
    """

    alphas_cumprod: np.ndarray
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    karras: Karras | None = None

    def __post_init__(self) -> None:
        if self.prediction_type == "epsilon" and self.zero_terminal_snr:
            raise UserError(
                "prediction_type='epsilon' is impossible with rescale_betas_zero_snr=true: at the last timestep the "
                "latents are the noise and say nothing of x_0; take v_prediction or sample"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, source: str = "scheduler_config.json") -> Schedule:
        """Reads a `scheduler_config.json`; only the schedule is taken, whatever solver class it names.

        Raises `UserError` for a setting that would change the ODE and that is not implemented, and for what is no
        schedule of betas: diffusers' defaults would be taken for it without a word.
        """
        name = str(config.get("_class_name", "DDIMScheduler")).removeprefix("Flax")
        if name in TIME_SCALES:
            karras = Karras.from_config(config, source=source)
            table = 1.0 / (1.0 + karras.sigmas(np.arange(LEVELS)) ** 2)
            return cls(table.astype(np.float32), EDM, "linspace", karras=karras)
        if name not in _CLASSES:
            raise UserError(f"{source}: {name} is no schedule of betas; known are {', '.join(_CLASSES)}")
        if not any(config.get(key) is not None for key in _BETA_KEYS):
            raise UserError(f"{source}: has none of {', '.join(_BETA_KEYS)}; fetch the file again")
        config = {**DEFAULTS, **config}
        for key in ("clip_sample", "thresholding", "use_flow_sigmas"):
            if config.get(key):
                raise UserError(f"{source}: {key}=true is not a deterministic ODE of the latents; set it to false")
        prediction_type = config["prediction_type"]
        if prediction_type not in PREDICTION_TYPES:
            raise UserError(f"{source}: prediction_type={prediction_type!r}; known are {', '.join(PREDICTION_TYPES)}")
        spacing = config["timestep_spacing"]
        if spacing not in SPACINGS:
            raise UserError(f"{source}: timestep_spacing={spacing!r}; known are {', '.join(SPACINGS)}")
        alphas_cumprod = np.cumprod(1.0 - _betas(config, source))
        if config["rescale_betas_zero_snr"]:
            alphas_cumprod = _zero_terminal_snr(alphas_cumprod)
        return cls(
            alphas_cumprod.astype(np.float32),
            prediction_type,
            spacing,
            _number(config, source, "steps_offset", AMOUNT),
            bool(config["set_alpha_to_one"]),
        )

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether x_T is noise alone (arXiv 2305.08891)."""
        return bool(self.alphas_cumprod[-1] == 0.0)

    def told(self, t: jax.Array) -> jax.Array:
        """What the network is told of timestep `t`."""
        return t if self.karras is None else self.karras.told(t)


def read_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What is read of a `scheduler_config.json`, with what it leaves out: equal for files of one schedule."""
    karras = config.get("_class_name") in TIME_SCALES and Karras.from_config(config, source="scheduler_config.json")
    levels = {"karras": dataclasses.asdict(karras)} if karras else {}
    return {**{key: config.get(key, default) for key, default in DEFAULTS.items()}, **levels}


def student_timestep(config: Mapping[str, Any]) -> int | None:
    """The timestep of the one-step student whose export wrote this `scheduler_config.json`; None for any other.

    diffusers keeps the mark `STUDENT` when it saves the folder again.
    """
    return config[STUDENT] if isinstance(config.get(STUDENT), int) else None


def _number(config: Mapping[str, Any], source: str, key: str, allowed: Range) -> Any:
    allowed.check(f"{source}: {key}", value := config[key])
    return value


def _betas(config: Mapping[str, Any], source: str) -> np.ndarray:
    """float64 (T,) betas as in diffusers' `beta_schedule`."""
    if (trained := config["trained_betas"]) is not None:
        if not isinstance(trained, list) or not trained or not all(beta in SHARE for beta in trained):
            raise UserError(f"{source}: trained_betas={str(trained)[:40]}; give a list, each {SHARE}")
        return np.asarray(trained, np.float64)
    total = _number(config, source, "num_train_timesteps", COUNT)
    start, end = _number(config, source, "beta_start", SHARE), _number(config, source, "beta_end", SHARE)
    name = config["beta_schedule"]
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


def split_signal_and_noise(
    prediction_type: str, output: jax.Array, latents: jax.Array, signal: jax.Array, sigma: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The network's raw output as an estimate of (x_0, eps), both float32, for latents signal * x_0 + sigma * eps.

    signal^2 + sigma^2 = 1, and both broadcast against latents (B, h, w, C). They are given apart because some callers
    know sigma better than float32's 1 - alpha_bar does: 2e-5 of it is lost at t = 0.
    """
    output, latents = output.astype(jnp.float32), latents.astype(jnp.float32)
    if prediction_type == EDM:
        # c_skip x + c_out F of arXiv 2206.00364, table 1, for x = latents / signal
        power = _power(signal, sigma)
        x0 = SIGMA_DATA**2 * signal / power * latents + SIGMA_DATA * sigma / jnp.sqrt(power) * output
        return x0, sigma / power * latents - SIGMA_DATA * signal / jnp.sqrt(power) * output
    if prediction_type == "epsilon":
        return (latents - sigma * output) / signal, output
    if prediction_type == "sample":
        return output, (latents - signal * output) / sigma
    return signal * latents - sigma * output, signal * output + sigma * latents


def shown(prediction_type: str, latents: jax.Array, signal: jax.Array, sigma: jax.Array) -> jax.Array:
    """Latents signal * x_0 + sigma * eps as the network sees them: at unit variance, as EDM's do by their c_in."""
    return latents / jnp.sqrt(_power(signal, sigma)) if prediction_type == EDM else latents


def ask(
    denoise: Denoiser, schedule: Schedule, latents: jax.Array, t: jax.Array, signal: jax.Array, sigma: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One network call at timestep `t`, where signal and sigma are those of `split_signal_and_noise`: (x_0, eps)."""
    output = denoise(shown(schedule.prediction_type, latents, signal, sigma), schedule.told(t))
    return split_signal_and_noise(schedule.prediction_type, output, latents, signal, sigma)


def _power(signal: jax.Array, sigma: jax.Array) -> jax.Array:
    return SIGMA_DATA**2 * signal * signal + sigma * sigma


def training_target(prediction_type: str, x0: jax.Array, noise: jax.Array, alpha_bar: jax.Array) -> jax.Array:
    """What the network is trained to output for x_t made from (x_0, eps)."""
    if prediction_type == EDM:
        signal, sigma = jnp.sqrt(alpha_bar), jnp.sqrt(1.0 - alpha_bar)
        mixed = sigma * x0 - SIGMA_DATA**2 * signal * noise
        return mixed / (SIGMA_DATA * jnp.sqrt(_power(signal, sigma)))
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x0
    return jnp.sqrt(alpha_bar) * noise - jnp.sqrt(1.0 - alpha_bar) * x0


def add_noise(x0: jax.Array, noise: jax.Array, alpha_bar: jax.Array) -> jax.Array:
    """x_t of the forward process; `alpha_bar` broadcasts against x0 (B, h, w, C)."""
    return jnp.sqrt(alpha_bar) * x0 + jnp.sqrt(1.0 - alpha_bar) * noise


def guided(
    unet: Callable[[jax.Array, jax.Array, Any], jax.Array],
    condition: Any,
    negative: Any,
    guidance_scale: float,
    guidance_rescale: float = 0.0,
) -> Denoiser:
    """Classifier-free guidance (arXiv 2207.12598) with both halves in one network call.

    `unet(latents, timesteps, condition)` takes a batch; condition and negative are pytrees of one structure (a text
    (B, L, D) alone, or with SDXL's added embeddings) whose arrays all start with the batch axis B. At
    guidance_scale <= 1 only the conditional half runs, and nothing is rescaled, as in diffusers. guidance_rescale in
    0..1 is the strength of `rescale_guided`.
    """
    if guidance_scale <= 1.0:
        return lambda latents, t: unet(latents, jnp.broadcast_to(t, latents.shape[:1]), condition)
    both = jax.tree.map(lambda *halves: jnp.concatenate(halves), negative, condition)

    def denoise(latents: jax.Array, t: jax.Array) -> jax.Array:
        twice = jnp.concatenate([latents, latents])  # (2B, h, w, C)
        output = unet(twice, jnp.broadcast_to(t, twice.shape[:1]), both).astype(jnp.float32)
        unconditional, conditional = jnp.split(output, 2)
        output = unconditional + guidance_scale * (conditional - unconditional)
        return rescale_guided(output, conditional, guidance_rescale) if guidance_rescale > 0.0 else output

    return denoise


def rescale_guided(output: jax.Array, conditional: jax.Array, guidance_rescale: float) -> jax.Array:
    """Guided output (B, h, w, C) mixed with itself at the conditional output's spread (arXiv 2305.08891, section 3.4).

    Guidance inflates the standard deviation, which overexposes images. Equal to diffusers' `rescale_noise_cfg`,
    whose per-sample deviation over all other axes is torch's: unbiased.
    """
    deviation = lambda x: jnp.std(x, axis=tuple(range(1, x.ndim)), ddof=1, keepdims=True)  # noqa: E731  (B, 1, 1, 1)
    rescaled = output * (deviation(conditional) / deviation(output))
    return guidance_rescale * rescaled + (1.0 - guidance_rescale) * output


def one_step(denoise: Denoiser, schedule: Schedule, timestep: int, noise: jax.Array) -> jax.Array:
    """The generator: noise (B, h, w, C) to x_0 in one network call at a fixed timestep; float32.

    With the teacher's weights this is its own first DDIM step taken all the way to x_0. EDM's begin at sigma times the
    noise, where the variance is not yet one.
    """
    alpha_bar = jnp.asarray(schedule.alphas_cumprod[timestep])
    signal, sigma = jnp.sqrt(alpha_bar), jnp.sqrt(1.0 - alpha_bar)
    start = noise if schedule.karras is None else noise * sigma
    return ask(denoise, schedule, start, jnp.asarray(timestep, jnp.int32), signal, sigma)[0]
