"""Every solver against diffusers' scheduler of that name, call by call; closed forms; what is refused.

Measured for 1, 2, 7 and 20 steps over all spacings and prediction types, as max|a - b| / max|b|: our float32 with
float64 tables is within 1e-6 of diffusers' own steps run in double on its own table (6e-6 for Heun on x_0 predictions
in two steps). What diffusers as shipped adds is its float32 tables, and the cancellation in x + (sigma' - sigma) eps.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2g_jax.diffusion import solvers
from d2g_jax.diffusion.schedule import PREDICTION_TYPES, SPACINGS, Schedule
from d2g_jax.runtime.errors import UserError

SD15 = {  # Stable Diffusion 1.5's own scheduler/scheduler_config.json
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
STEPS = (1, 2, 7, 20)
COMBINATIONS = [
    (name, prediction_type, zero_snr)
    for name in solvers.SOLVERS
    for prediction_type in PREDICTION_TYPES
    for zero_snr in (False, True)
    if not zero_snr or (name != "heun" and prediction_type != "epsilon")
]
NOISE = np.random.default_rng(0).standard_normal((2, 4, 4, 4)).astype(np.float32)

# diffusers makes numpy arrays of torch tensors in a way that numpy 2 deprecates.
diffusers_warns = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def toy_model(latents, t):
    """Bounded, and a function of the latents and of the time, in torch and jax alike."""
    return latents / (1.0 + latents**2) + 0.1 * (t / 1000.0)


def scheduler(name, config):
    """diffusers' scheduler for `solvers.SOLVERS[name]`."""
    pytest.importorskip("torch").set_num_threads(1)
    diffusers = pytest.importorskip("diffusers")
    classes = {
        "ddim": diffusers.DDIMScheduler,
        "euler": diffusers.EulerDiscreteScheduler,
        "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
        "heun": diffusers.HeunDiscreteScheduler,
    }
    # Without the foreign class name, or from_config takes that class's defaults into account.
    return classes[name].from_config({key: value for key, value in config.items() if not key.startswith("_")})


def their_run(oracle, steps, double=False):
    """What diffusers' pipelines do around the network: (timesteps, network inputs, result).

    With `double`, its tables and states are float64: the same formulas almost without rounding.
    """
    import torch

    oracle.set_timesteps(steps)
    latents = torch.from_numpy(NOISE)
    if double:
        latents, oracle.sigmas = latents.double(), oracle.sigmas.double()
    latents = latents * oracle.init_noise_sigma
    inputs = []
    with pytest.MonkeyPatch.context() as patch:
        if double:
            patch.setattr(torch, "float32", torch.float64)  # Euler's step casts its state to torch.float32
        for t in oracle.timesteps:
            inputs.append(oracle.scale_model_input(latents, t))
            latents = oracle.step(toy_model(inputs[-1], t), t, latents).prev_sample
    assert latents.dtype == (torch.float64 if double else torch.float32)
    return oracle.timesteps.tolist(), [x.numpy() for x in inputs], latents.numpy()


def our_run(name, schedule, steps):
    """The solver with its scan as a Python loop, in which the network sees values: as `their_run`."""
    calls = []

    def record(latents, t):
        assert latents.dtype == jnp.float32
        calls.append((t.item(), np.asarray(latents)))
        return toy_model(latents, t)

    def loop(step, carry, inputs):
        for i in range(len(inputs[0])):
            carry, _ = step(carry, tuple(jnp.asarray(np.asarray(x)[i]) for x in inputs))
        return carry, None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "scan", loop)
        result = solvers.SOLVERS[name](record, schedule, steps, NOISE)
    assert result.dtype == jnp.float32
    return [t for t, _ in calls], [x for _, x in calls], np.asarray(result)


def largest_difference(ours, theirs):
    """Of two runs with equal timesteps: the worst max|a - b| / max|b| over all network inputs and the result."""
    assert ours[0] == theirs[0]
    pairs = [*zip(ours[1], theirs[1], strict=True), (ours[2], theirs[2])]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


@diffusers_warns
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("name", "prediction_type", "zero_snr"), COMBINATIONS)
def test_every_call_equals_diffusers(name, prediction_type, zero_snr, spacing):
    config = SD15 | {
        "prediction_type": prediction_type,
        "timestep_spacing": spacing,
        "set_alpha_to_one": spacing != "leading",
    }
    if zero_snr:
        config["rescale_betas_zero_snr"] = True
    schedule = Schedule.from_config(config)
    tolerance = 1e-5
    if (name, zero_snr) == ("euler", True):
        # From sigma = 4096, diffusers' x + (sigma' - sigma) eps loses 4096 x 2^-24 = 2e-4 of x in its float32; see
        # the test in double below.
        tolerance = 3e-3
    if prediction_type == "sample" and (name == "heun" or zero_snr):
        # eps = (x - x_0) / sigma at sigma = 0.03 multiplies by 34 what float32 betas or a cancellation left over.
        tolerance = max(tolerance, 2e-5)
    for steps in STEPS:
        ours, theirs = our_run(name, schedule, steps), their_run(scheduler(name, config), steps)
        assert largest_difference(ours, theirs) <= tolerance, steps
        assert len(ours[0]) == solvers.network_calls(name, steps)
        assert ours[0][0] == solvers.first_timestep(name, schedule, steps)


@diffusers_warns
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("name", "prediction_type", "zero_snr"), [c for c in COMBINATIONS if c[0] != "ddim"])
def test_every_call_equals_diffusers_in_double(name, prediction_type, zero_snr, spacing):
    config = SD15 | {"prediction_type": prediction_type, "timestep_spacing": spacing}
    if zero_snr:
        config["rescale_betas_zero_snr"] = True
    # On diffusers' own table, what is left is our rounding.
    table = scheduler(name, config).alphas_cumprod.numpy()
    schedule = dataclasses.replace(Schedule.from_config(config), alphas_cumprod=table)
    for steps in (2, 7):
        ours, theirs = our_run(name, schedule, steps), their_run(scheduler(name, config), steps, double=True)
        assert largest_difference(ours, theirs) <= (1e-5 if (name, prediction_type) == ("heun", "sample") else 2e-6)


@diffusers_warns
@pytest.mark.parametrize(("name", "first"), [("ddim", 981), ("euler", 981), ("heun", 981), ("dpmpp_2m", 951)])
def test_sd15_as_published(name, first):
    """Our reading of the folder's file is "leading", as PNDM's and DDIM's, also for the other solvers."""
    schedule = Schedule.from_config(SD15)
    theirs = their_run(scheduler(name, SD15 | {"timestep_spacing": "leading"}), 50)
    assert largest_difference(our_run(name, schedule, 50), theirs) <= 1e-5
    assert solvers.first_timestep(name, schedule, 50) == first == theirs[0][0]


@diffusers_warns
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [3, 61, 333, 998, 1000])
def test_timesteps_equal_diffusers(name, spacing, steps):
    if (name, steps) == ("dpmpp_2m", 1000) and spacing != "trailing":
        pytest.skip("refused: see test_dpmpp_2m_refuses_steps_that_share_a_noise_level")
    config = SD15 | {"timestep_spacing": spacing}
    oracle = scheduler(name, config)
    oracle.set_timesteps(steps)
    expected = oracle.timesteps.numpy()
    if name == "heun":
        expected = np.append(expected[:1], expected[1::2])  # each but the first stands there twice
    # np.arange(1000, 0, -1000 / 61) has 62 entries: diffusers then takes one step too many, at t = -1.
    expected = expected[:steps]
    found = solvers.timesteps(name, Schedule.from_config(config), steps)
    assert found.dtype == (np.int32 if name == "dpmpp_2m" else np.float32)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_a_program_holds_the_network_once_whatever_the_steps(name):
    schedule = Schedule.from_config(SD15 | {"prediction_type": "v_prediction", "timestep_spacing": "linspace"})
    traced = []

    def denoise(latents, t):
        traced.append(t.dtype)
        return toy_model(latents, t)

    for steps in (1, 20):
        found = jax.jit(lambda x, steps=steps: solvers.SOLVERS[name](denoise, schedule, steps, x))(NOISE)
        expected = our_run(name, schedule, steps)[2]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert traced == [jnp.float32 if name in ("euler", "heun") else jnp.int32] * 2


@pytest.mark.parametrize(("name", "bound"), [("ddim", 0.08), ("euler", 0.08), ("dpmpp_2m", 0.025), ("heun", 0.006)])
def test_gaussian_data_are_solved(name, bound):
    """Data N(0, 1) have eps(x) = x sqrt(1 - ab), and the ODE leaves unit-variance latents as they are.

    Measured with 20 steps: 0.065, 0.065, 0.019, 0.0045; the second-order solvers are what they say.
    """
    # Zero as last noise level for all: DDIM's last step would otherwise stop at t = 0.
    schedule = Schedule.from_config(SD15 | {"set_alpha_to_one": True, "steps_offset": 0})
    alphas = jnp.asarray(schedule.alphas_cumprod)

    def denoise(latents, t):
        return latents * jnp.sqrt(1.0 - alphas[t.astype(jnp.int32)])

    def error(steps):
        found = jax.jit(lambda x: solvers.SOLVERS[name](denoise, schedule, steps, x))(NOISE)
        return float(np.abs(found - NOISE).max() / np.abs(NOISE).max())

    assert error(20) <= bound
    assert error(80) <= bound / 3.0


def test_heun_refuses_zero_terminal_snr():
    schedule = Schedule.from_config(SD15 | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True})
    with pytest.raises(UserError, match=r"solver=heun.*rescale_betas_zero_snr"):
        solvers.heun(toy_model, schedule, 2, NOISE)


@pytest.mark.parametrize(
    ("spacing", "offset", "steps"), [("leading", 0, 1000), ("leading", 1, 999), ("linspace", 0, 1000)]
)
def test_dpmpp_2m_refuses_steps_that_share_a_noise_level(spacing, offset, steps):
    """diffusers divides by their distance, zero."""
    schedule = Schedule.from_config(SD15 | {"timestep_spacing": spacing, "steps_offset": offset})
    with pytest.raises(UserError, match=f"steps={steps} .*dpmpp_2m.*{spacing}"):
        solvers.first_timestep("dpmpp_2m", schedule, steps)


@pytest.mark.parametrize("name", solvers.SOLVERS)
@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_out_of_range(name, steps):
    with pytest.raises(UserError, match=f"steps={steps} is out of range"):
        solvers.SOLVERS[name](toy_model, Schedule.from_config(SD15), steps, NOISE)


def test_unknown_solvers_are_refused_with_the_known_ones():
    with pytest.raises(UserError, match="solver='plms'; known are ddim, euler, dpmpp_2m, heun"):
        solvers.first_timestep("plms", Schedule.from_config(SD15), 2)
    with pytest.raises(UserError, match="solver='plms'"):
        solvers.network_calls("plms", 2)
