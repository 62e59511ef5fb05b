"""The schedule and guidance against diffusers' own, the one-step generator against closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest

from d2g_jax.diffusion import schedule as diffusion
from d2g_jax.diffusion import solvers
from d2g_jax.runtime.errors import UserError

SD15 = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def test_sd15_alphas_are_the_published_ones():
    schedule = diffusion.Schedule.from_config(SD15)
    assert schedule.alphas_cumprod[999] == pytest.approx(0.00466, abs=5e-6)
    assert schedule.alphas_cumprod[981] == pytest.approx(0.00578, abs=5e-6)
    assert schedule.alphas_cumprod[399] == pytest.approx(0.426, abs=5e-4)
    assert solvers.first_timestep("ddim", schedule, 50) == 981


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
    schedule = diffusion.Schedule.from_config(SD15 | {"timestep_spacing": spacing})
    np.testing.assert_array_equal(solvers.timesteps("ddim", schedule, steps), expected)


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
    ones, latents = jnp.ones((1, 1, 1, 1), jnp.bfloat16), jnp.full((1, 1, 1, 1), 1.01)
    x0, _ = diffusion.split_signal_and_noise("epsilon", ones, latents, jnp.sqrt(0.00466), jnp.sqrt(1.0 - 0.00466))
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


def test_guidance_joins_the_halves_of_a_tree():
    def unet(latents, timesteps, condition):
        assert timesteps.tolist() == [5, 5, 5, 5]
        return latents * condition["text"][:, :1, :1, None] + condition["added"]["size"][:, :, None, None]

    def tree(text, size):
        return {"text": jnp.full((2, 3, 1), text), "added": {"size": jnp.full((2, 1), size)}}

    x = jnp.ones((2, 1, 1, 1))
    found = diffusion.guided(unet, tree(3.0, 10.0), tree(1.0, 20.0), 2.0)(x, jnp.int32(5))
    assert found.ravel().tolist() == [5.0, 5.0]  # 21 + 2 (13 - 21)


@pytest.mark.parametrize("guidance_rescale", [0.3, 0.7, 1.0])
def test_guidance_rescale_equals_diffusers(guidance_rescale):
    torch = pytest.importorskip("torch")
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    rng = np.random.default_rng(2)
    # Of different spread per sample, so that one deviation for the whole batch would be found out.
    outputs = (rng.standard_normal((4, 4, 4, 2)) * np.array([1, 5, 2, 0.1])[:, None, None, None]).astype(np.float32)
    unconditional, conditional = torch.from_numpy(outputs).chunk(2)
    expected = rescale_noise_cfg(
        unconditional + 7.5 * (conditional - unconditional), conditional, guidance_rescale=guidance_rescale
    ).numpy()

    text = jnp.zeros((2, 1, 1))
    denoise = diffusion.guided(lambda latents, t, text: outputs[: len(latents)], text, text, 7.5, guidance_rescale)
    found = denoise(jnp.zeros((2, 4, 4, 2)), jnp.int32(0))
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


def test_guidance_rescale_needs_guidance():
    text = jnp.zeros((2, 1, 1))
    latents = jnp.arange(8.0).reshape(2, 2, 2, 1)
    plain = diffusion.guided(lambda latents, t, text: latents, text, text, 1.0, 0.7)
    np.testing.assert_array_equal(plain(latents, jnp.int32(0)), latents)


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
        solvers.timesteps("ddim", diffusion.Schedule.from_config(SD15), steps)


def test_epsilon_at_zero_terminal_snr_is_refused():
    with pytest.raises(UserError, match=r"prediction_type='epsilon'.*rescale_betas_zero_snr"):
        diffusion.Schedule.from_config(SD15 | {"rescale_betas_zero_snr": True})


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_one_step_from_noise_alone_is_finite(prediction_type):
    schedule = diffusion.Schedule.from_config(
        SD15 | {"prediction_type": prediction_type, "rescale_betas_zero_snr": True}
    )
    assert schedule.alphas_cumprod[999] == 0.0
    found = diffusion.one_step(lambda x, t: 2.0 * x, schedule, 999, jnp.ones((1, 2, 2, 1)))
    # v = -x_0 there, and x_0 is x_0.
    np.testing.assert_array_equal(found, np.full((1, 2, 2, 1), -2.0 if prediction_type == "v_prediction" else 2.0))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "FlowMatchEulerDiscreteScheduler is no"),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 1.0}, "FlowMatchHeunDiscreteScheduler is no"),
        ({"_class_name": "VQDiffusionScheduler", "num_vec_classes": 8}, "VQDiffusionScheduler is no schedule of betas"),
        ({"_class_name": "UnCLIPScheduler", "prediction_type": "epsilon"}, "UnCLIPScheduler is no schedule of betas"),
        ({"_class_name": "DDIMScheduler", "num_train_timesteps": 1000}, "has none of beta_schedule, beta_start"),
        ({"prediction_type": "epsilon"}, "has none of beta_schedule"),
        (SD15 | {"use_flow_sigmas": True}, "use_flow_sigmas=true is not"),
    ],
)
def test_what_is_no_schedule_of_betas_is_refused(config, message):
    with pytest.raises(UserError, match=f"a.json: {message}"):
        diffusion.Schedule.from_config(config, source="a.json")


@pytest.mark.parametrize("name", ["DDIMScheduler", "FlaxPNDMScheduler", "EulerAncestralDiscreteScheduler"])
def test_whatever_goes_through_a_schedule_of_betas_is_read(name):
    assert diffusion.Schedule.from_config(SD15 | {"_class_name": name}).num_train_timesteps == 1000
