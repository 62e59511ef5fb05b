"""EDM's levels, preconditioning, Heun's method and the student, against equations of arXiv 2206.00364 in double."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from d2g_jax.diffusion import solvers
from d2g_jax.diffusion.schedule import EDM, Schedule, add_noise, one_step, training_target
from d2g_jax.runtime.errors import UserError

CONFIG = {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
NOISE = np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype(np.float32)


def network(xp, x, told):
    """A bounded F of what the network sees and is told."""
    return x / (1 + x * x) + 0.3 * xp.sin(told) - 0.2


def denoised(x, sigma):
    """D(x; sigma) of table 1."""
    c_skip, c_out = 0.25 / (sigma**2 + 0.25), 0.5 * sigma / np.sqrt(sigma**2 + 0.25)
    return c_skip * x + c_out * network(np, x / np.sqrt(sigma**2 + 0.25), np.log(sigma) / 4)


def levels(steps):
    """Equation 5, with the 0 behind it."""
    i = np.arange(steps, dtype=np.float64) / (steps - 1)
    return np.append((80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7, 0.0)


def algorithm_1(noise, steps, second_order):
    t = levels(steps)
    x = noise.astype(np.float64) * t[0]
    for now, then in itertools.pairwise(t):
        slope = (x - denoised(x, now)) / now
        arrived = x + (then - now) * slope
        if then and second_order:
            slope = (slope + (arrived - denoised(arrived, then)) / then) / 2
            arrived = x + (then - now) * slope
        x = arrived
    return x


@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_solutions_equal_the_papers_algorithm(solver):
    calls = []

    def denoise(x, t):
        calls.append(t)
        return network(jnp, x, t)

    schedule = Schedule.from_config(CONFIG)
    ours = solvers.SOLVERS[solver](denoise, schedule, 18, NOISE)
    theirs = algorithm_1(NOISE, 18, solver == "heun")
    assert np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max() < 1e-5
    assert solvers.network_calls("heun", 18) == 35
    assert len(calls) == 1  # the network is compiled once


def test_levels_are_equation_5_and_the_student_starts_at_80():
    schedule = Schedule.from_config(CONFIG)
    places = solvers.timesteps("heun", schedule, 18)
    np.testing.assert_allclose(schedule.karras.sigmas(places), levels(18)[:-1], rtol=1e-5)
    np.testing.assert_allclose(schedule.karras.told(jnp.asarray(places)), np.log(levels(18)[:-1]) / 4, atol=2e-6)
    start = solvers.first_timestep("heun", schedule, 18)
    student = one_step(lambda x, t: network(jnp, x, t), schedule, start, NOISE)
    np.testing.assert_allclose(student, denoised(80.0 * NOISE.astype(np.float64), 80.0), rtol=1e-5, atol=1e-6)


def test_one_euler_step_of_diffusers_is_the_student():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EDMEulerScheduler.from_config(CONFIG)
    scheduler.set_timesteps(1)
    x = torch.from_numpy(NOISE) * 80.0
    (t,) = scheduler.timesteps
    seen = scheduler.scale_model_input(x, t)
    output = network(torch, seen, t)
    theirs = scheduler.step(output, t, x).prev_sample.numpy()
    schedule = Schedule.from_config(CONFIG)
    ours = one_step(lambda x, t: network(jnp, x, t), schedule, schedule.num_train_timesteps - 1, NOISE)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", [0, 300, 999])
def test_a_perfect_network_gives_the_image_back(place):
    schedule = Schedule.from_config(CONFIG)
    alpha_bar = schedule.alphas_cumprod[place]
    x0 = np.random.default_rng(1).standard_normal(NOISE.shape).astype(np.float32)
    target = training_target(EDM, x0, NOISE, alpha_bar)
    sigma = np.sqrt((1 - alpha_bar) / alpha_bar)
    noisy = np.asarray(add_noise(x0, NOISE, alpha_bar)) / np.sqrt(alpha_bar)
    wanted = (x0 - 0.25 / (sigma**2 + 0.25) * noisy) / (0.5 * sigma / np.sqrt(sigma**2 + 0.25))
    np.testing.assert_allclose(target, wanted, atol=2e-3 if place == 0 else 1e-5)


def test_openai_conversions_are_told_a_thousand_times_more():
    schedule = Schedule.from_config({**CONFIG, "_class_name": "CMStochasticIterativeScheduler"})
    np.testing.assert_allclose(schedule.told(jnp.asarray(999)), 250 * np.log(80), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma_data": 1.0}, "sigma_data=1.0 is not implemented; only 0.5 is"),
        ({"sigma_schedule": "exponential"}, "sigma_schedule='exponential' is not implemented"),
        ({"prediction_type": "v_prediction"}, "prediction_type='v_prediction' is not implemented"),
        ({"sigma_max": "80"}, "sigma_max='80'"),
        ({"rho": 0.001}, "rho=0.001; give a number from 0.2 to 100"),
        ({"sigma_min": 90.0}, "sigma_min=90.0 is not below sigma_max=80.0"),
    ],
)
def test_other_levels_are_refused_by_name(change, message):
    with pytest.raises(UserError, match=message):
        Schedule.from_config({**CONFIG, **change}, source="scheduler_config.json")
