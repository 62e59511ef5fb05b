"""Solvers of the probability-flow ODE: noise to latents, as pure functions that equal diffusers' schedulers.

Every solver is `solver(denoise, schedule, num_steps, noise)`: noise is standard normal (B, h, w, C), the result
float32 scaled latents of that shape. The steps are one `lax.scan` with one network call in its body, so that a program
compiles equally fast for any number of steps. What depends on the schedule alone is computed on the host in float64.

Notation: with sigma = sqrt((1 - ab) / ab), the state of `euler` and `heun` is x_t / sqrt(ab) = x_0 + sigma eps, the
"variance exploding" latents whose ODE is dx/dsigma = eps (arXiv 2206.00364, section 3); the network is asked at unit
variance, x sqrt(ab).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2g_jax.diffusion.schedule import Denoiser, Schedule, ask
from d2g_jax.runtime.errors import UserError

Solver = Callable[[Denoiser, Schedule, int, jax.Array], jax.Array]
"""(denoise, schedule, num_steps, noise (B, h, w, C)) -> float32 scaled latents (B, h, w, C)."""


def ddim(denoise: Denoiser, schedule: Schedule, num_steps: int, noise: jax.Array) -> jax.Array:
    """The deterministic DDIM solution (arXiv 2010.02502, eq. 12 with sigma = 0) that starts at `noise`.

    Equal to diffusers' `DDIMScheduler` with eta = 0.
    """
    steps = timesteps("ddim", schedule, num_steps)
    # As in diffusers: not the next timestep visited, which differs from it where T / num_steps is not whole.
    previous = steps - schedule.num_train_timesteps // num_steps
    alphas = schedule.alphas_cumprod
    final = np.float32(1.0) if schedule.set_alpha_to_one else alphas[0]
    alpha_now, alpha_next = alphas[steps], np.where(previous >= 0, alphas[np.maximum(previous, 0)], final)

    def step(latents: jax.Array, inputs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        t, now, then = inputs
        x0, eps = ask(denoise, schedule, latents, t, jnp.sqrt(now), jnp.sqrt(1.0 - now))
        return jnp.sqrt(then) * x0 + jnp.sqrt(1.0 - then) * eps, None

    inputs = (jnp.asarray(steps), jnp.asarray(alpha_now), jnp.asarray(alpha_next))
    return jax.lax.scan(step, noise.astype(jnp.float32), inputs)[0]


def euler(denoise: Denoiser, schedule: Schedule, num_steps: int, noise: jax.Array) -> jax.Array:
    """Euler's method in sigma (arXiv 2206.00364, algorithm 1 without its correction), down to sigma = 0.

    Equal to diffusers' `EulerDiscreteScheduler`.
    """
    steps = timesteps("euler", schedule, num_steps)
    sigmas = _sigmas(schedule, steps)

    def step(latents: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        t, signal, sigma, then = inputs
        x0, eps = ask(denoise, schedule, latents * signal, t, signal, sigma)
        # x + (then - now) eps, without its cancellation: at zero terminal SNR now = 4096.
        return x0 + then * eps, None

    inputs = _tables(steps, *_signal_and_noise(sigmas[:-1]), sigmas[1:])
    return jax.lax.scan(step, _start(schedule, sigmas, noise), inputs)[0]


def heun(denoise: Denoiser, schedule: Schedule, num_steps: int, noise: jax.Array) -> jax.Array:
    """Heun's method in sigma (arXiv 2206.00364, algorithm 1 without churn); its last step, to sigma = 0, is Euler's.

    2 num_steps - 1 network calls. Equal to diffusers' `HeunDiscreteScheduler`, and with EDM's levels to EDM's sampler.
    Raises `UserError` at zero terminal SNR, which that scheduler does not know.
    """
    steps = timesteps("heun", schedule, num_steps)
    sigmas = _sigmas(schedule, steps)
    # One scan entry per network call, so that the network is compiled once: at each sigma Euler's step to the next one,
    # and at each sigma reached so, before that, the correction by the slope found there.
    calls = np.repeat(np.arange(num_steps), 2)[1:]  # 0 1 1 2 2 ...
    correct = np.arange(len(calls)) % 2 == 1
    half_steps = np.diff(sigmas, prepend=sigmas[0])[calls] / 2.0  # of the step that led to this sigma

    def call(carry: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, ...]) -> tuple[Any, None]:
        latents, slope_before = carry
        t, signal, sigma, then, half_step, correct = inputs
        x0, slope = ask(denoise, schedule, latents * signal, t, signal, sigma)
        # The mean of two slopes from where the step began is half their difference from where it arrived.
        corrected = latents + half_step * (slope - slope_before)
        return (jnp.where(correct, corrected, x0 + then * slope), slope), None

    start = _start(schedule, sigmas, noise)
    signal, sigma = _signal_and_noise(sigmas[:-1])
    inputs = _tables(steps[calls], signal[calls], sigma[calls], sigmas[1:][calls], half_steps)
    return jax.lax.scan(call, (start, jnp.zeros_like(start)), (*inputs, jnp.asarray(correct)))[0][0]


def dpmpp_2m(denoise: Denoiser, schedule: Schedule, num_steps: int, noise: jax.Array) -> jax.Array:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), first order in its first step and in its last, to sigma = 0.

    Equal to diffusers' `DPMSolverMultistepScheduler` with its defaults: second order, midpoint.
    Raises `UserError` where two steps would share a noise level.
    """
    steps = timesteps("dpmpp_2m", schedule, num_steps)
    sigmas = _sigmas(schedule, steps)

    def step(carry: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, ...]) -> tuple[Any, None]:
        latents, x0_before = carry
        t, signal, sigma, keep, take, extrapolate = inputs
        x0, _ = ask(denoise, schedule, latents, t, signal, sigma)
        return (keep * latents + take * x0 + extrapolate * (x0 - x0_before), x0), None

    start = noise.astype(jnp.float32)
    inputs = _tables(steps, *_signal_and_noise(sigmas[:-1]), *_multistep_weights(sigmas))
    return jax.lax.scan(step, (start, jnp.zeros_like(start)), inputs)[0][0]


SOLVERS: dict[str, Solver] = {"ddim": ddim, "euler": euler, "dpmpp_2m": dpmpp_2m, "heun": heun}


def first_timestep(name: str, schedule: Schedule, num_steps: int) -> int:
    """The timestep at which that solver sees pure noise: the generator's timestep. Raises as `timesteps` does.

    Always a whole number: also a fractional "linspace" begins at T - 1 (or, with a single step, at 0).
    """
    return int(timesteps(name, schedule, num_steps)[0])


def network_calls(name: str, num_steps: int) -> int:
    """How often that solver calls the denoiser. Raises `UserError` for an unknown name."""
    _check_name(name)
    return 2 * num_steps - 1 if name == "heun" else num_steps


def timesteps(name: str, schedule: Schedule, num_steps: int) -> np.ndarray:
    """(num_steps,), falling, equal to `set_timesteps` of that solver's scheduler in diffusers (heun's: each once).

    int32 for ddim and dpmpp_2m; float32 for euler and heun, whose "linspace" is not rounded.
    Raises `UserError` for an unknown name, and for a schedule or a number of steps that the solver cannot take.
    """
    _check_name(name)
    total, spacing = schedule.num_train_timesteps, schedule.timestep_spacing
    if not 1 <= num_steps <= total:
        raise UserError(f"steps={num_steps} is out of range: the schedule has 1 to {total} steps")
    if name == "heun" and schedule.zero_terminal_snr:
        raise UserError(
            "solver=heun does not work with rescale_betas_zero_snr=true: diffusers' HeunDiscreteScheduler has no such "
            "setting; take ddim, euler or dpmpp_2m"
        )
    count = num_steps + (name == "dpmpp_2m")  # diffusers thins out to one more there, and drops the last
    if spacing == "leading":
        steps = (np.arange(count) * (total // count))[::-1] + schedule.steps_offset
    elif spacing == "trailing":  # for some num_steps rounding makes arange one longer
        steps = np.round(np.arange(total, 0, -total / num_steps)) - 1
    else:
        steps = np.linspace(0, total - 1, count)[::-1]
    steps = steps[:num_steps]
    if name in ("euler", "heun"):
        return steps.astype(np.float32)
    steps = np.round(steps)
    visited = np.minimum(steps, total - 1)
    if name == "dpmpp_2m" and len(np.unique(visited)) < num_steps:
        raise UserError(
            f"steps={num_steps} is out of range: with solver=dpmpp_2m and timestep_spacing={spacing} "
            f"two of them would share a noise level; take fewer"
        )
    return (visited if name == "ddim" else steps).astype(np.int32)


def _check_name(name: str) -> None:
    if name not in SOLVERS:
        raise UserError(f"solver={name!r}; known are {', '.join(SOLVERS)}")


def _sigmas(schedule: Schedule, steps: np.ndarray) -> np.ndarray:
    """float64 (num_steps + 1,): sqrt((1 - ab) / ab) at the timesteps, linear between whole ones, and 0 at the end."""
    if schedule.karras is not None:
        return np.append(schedule.karras.sigmas(steps), 0.0)
    alphas = schedule.alphas_cumprod.astype(np.float64)
    # diffusers' stand-in for a terminal ab of 0, so that the first sigma is finite (4096).
    alphas = np.where(alphas == 0.0, 2.0**-24, alphas)
    return np.append(np.interp(steps, np.arange(len(alphas)), np.sqrt((1.0 - alphas) / alphas)), 0.0)


def _signal_and_noise(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(sqrt(ab), sqrt(1 - ab)), float64."""
    signal = 1.0 / np.hypot(1.0, sigmas)
    return signal, sigmas * signal


def _tables(steps: np.ndarray, *tables: np.ndarray) -> tuple[jax.Array, ...]:
    """The timesteps in their own dtype and the tables in float32, as a scan's inputs."""
    return jnp.asarray(steps), *(jnp.asarray(table, jnp.float32) for table in tables)


def _start(schedule: Schedule, sigmas: np.ndarray, noise: jax.Array) -> jax.Array:
    """Noise at diffusers' `init_noise_sigma`, float32: only "leading" counts the signal's share of the variance."""
    scale = np.hypot(sigmas[0], 1.0) if schedule.timestep_spacing == "leading" else sigmas[0]
    return noise.astype(jnp.float32) * np.float32(scale)


def _multistep_weights(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights of x, x_0 and (x_0 - the previous x_0) in each step's result; float64 (num_steps,) each.

    With lambda = -log(sigma) and h its rise over a step, exp(-h) is the ratio of the sigmas. The last step's h is
    infinite, and it and the first step (which has no previous x_0) are of first order.
    """
    signal, noise = _signal_and_noise(sigmas)
    keep, take = noise[1:] / noise[:-1], signal[1:] * (1.0 - sigmas[1:] / sigmas[:-1])
    rise = np.diff(-np.log(sigmas[:-1]))
    extrapolate = np.zeros_like(take)
    extrapolate[1:-1] = 0.5 * take[1:-1] * rise[1:] / rise[:-1]
    return keep, take, extrapolate
