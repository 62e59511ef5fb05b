"""The schedule and the DDIM solver against diffusers' own, guidance and the one-step generator against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2g_jax import diffusion
from d2g_jax.errors import UserError

SD15 = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def toy_model(latents, t):
    """Bounded, and a function of the latents and of the time, in torch and jax alike."""
    return latents / (1.0 + latents**2) + 0.1 * (t / 1000.0)


def test_sd15_alphas_are_the_published_ones():
    schedule = diffusion.Schedule.from_config(SD15)
    assert schedule.alphas_cumprod[999] == pytest.approx(0.00466, abs=5e-6)
    assert schedule.alphas_cumprod[981] == pytest.approx(0.00578, abs=5e-6)
    assert schedule.alphas_cumprod[399] == pytest.approx(0.426, abs=5e-4)
    assert schedule.first_timestep(50) == 981


@pytest.mark.parametrize("prediction_type", diffusion.PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("spacing", "alpha_to_one", "zero_snr"),
    [("leading", False, False), ("trailing", True, False), ("linspace", True, False), ("trailing", True, True)],
)
def test_ddim_equals_diffusers(prediction_type, spacing, alpha_to_one, zero_snr):
    if prediction_type == "epsilon" and zero_snr:
        pytest.skip("epsilon divides by zero at zero signal")
    torch = pytest.importorskip("torch")
    from diffusers import DDIMScheduler

    config = SD15 | {
        "prediction_type": prediction_type,
        "timestep_spacing": spacing,
        "set_alpha_to_one": alpha_to_one,
        "rescale_betas_zero_snr": zero_snr,
    }
    noise = np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype(np.float32)
    oracle = DDIMScheduler.from_config(config)
    oracle.set_timesteps(20)
    expected = torch.from_numpy(noise)
    for t in oracle.timesteps:
        expected = oracle.step(toy_model(expected, t), t, expected).prev_sample

    schedule = diffusion.Schedule.from_config(config)
    np.testing.assert_array_equal(schedule.timesteps(20), oracle.timesteps.numpy())
    ours = jax.jit(lambda x: diffusion.ddim(toy_model, schedule, 20, x))(noise)
    difference = np.abs(np.asarray(ours) - expected.numpy()).max() / np.abs(expected.numpy()).max()
    # diffusers multiplies its alphas up in float32, we in float64; epsilon at t = 999 magnifies that by 14.
    assert difference <= (4e-5 if prediction_type == "epsilon" else 2e-5)


@pytest.mark.parametrize("spacing", diffusion.SPACINGS)
@pytest.mark.parametrize("steps", [1, 3, 7, 50, 999, 1000])
def test_timesteps_equal_diffusers(spacing, steps):
    pytest.importorskip("torch")
    from diffusers import DDIMScheduler

    oracle = DDIMScheduler.from_config(SD15 | {"timestep_spacing": spacing})
    try:
        oracle.set_timesteps(steps)
    except ValueError:
        pytest.skip("diffusers has no such schedule")
    expected = np.minimum(oracle.timesteps.numpy(), 999)
    np.testing.assert_array_equal(
        diffusion.Schedule.from_config(SD15 | {"timestep_spacing": spacing}).timesteps(steps), expected
    )


@pytest.mark.parametrize("prediction_type", diffusion.PREDICTION_TYPES)
def test_a_perfect_model_is_solved_in_one_step(prediction_type):
    schedule = diffusion.Schedule.from_config(SD15 | {"prediction_type": prediction_type})
    rng = np.random.default_rng(1)
    x0, eps = (rng.standard_normal((3, 2, 2, 4)).astype(np.float32) for _ in range(2))
    alpha_bar = schedule.alphas_cumprod[981]
    target = diffusion.training_target(prediction_type, x0, eps, alpha_bar)
    noisy = diffusion.add_noise(x0, eps, alpha_bar)
    found = diffusion.one_step(lambda x, t: target, schedule, 981, noisy)
    np.testing.assert_allclose(found, x0, atol=1e-5 if prediction_type != "epsilon" else 5e-5)


def test_x0_is_computed_in_float32_from_bfloat16_outputs():
    x0, _ = diffusion.to_x0_and_noise(
        "epsilon", jnp.ones((1, 1, 1, 1), jnp.bfloat16), jnp.full((1, 1, 1, 1), 1.01), 0.00466
    )
    assert x0.dtype == jnp.float32
    assert float(x0[0, 0, 0, 0]) == pytest.approx((1.01 - np.sqrt(1 - 0.00466)) / np.sqrt(0.00466), rel=1e-4)


def test_guidance_is_one_call_and_extrapolates():
    calls = []

    def unet(latents, timesteps, text):
        calls.append(latents.shape)
        return latents * text[:, :1, :1, None]

    x, text, negative = jnp.ones((2, 1, 1, 1)), jnp.full((2, 1, 1), 3.0), jnp.full((2, 1, 1), 1.0)
    assert diffusion.guided(unet, text, negative, 2.0)(x, jnp.int32(5)).ravel().tolist() == [5.0, 5.0]
    assert diffusion.guided(unet, text, negative, 1.0)(x, jnp.int32(5)).ravel().tolist() == [3.0, 3.0]
    assert calls == [(4, 1, 1, 1), (2, 1, 1, 1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "score"}, "prediction_type"),
        ({"timestep_spacing": "random"}, "timestep_spacing"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule"),
        ({"clip_sample": True}, "clip_sample"),
        ({"thresholding": True}, "thresholding"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=message):
        diffusion.Schedule.from_config(SD15 | change)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_out_of_range(steps):
    with pytest.raises(UserError, match="out of range"):
        diffusion.Schedule.from_config(SD15).timesteps(steps)
