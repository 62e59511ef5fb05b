"""The one-step systems of the paper's tables against diffusers' own pipelines and schedulers, on random weights."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2g_jax.__main__ import main
from d2g_jax.diffusion.schedule import Schedule
from d2g_jax.diffusion.systems import SYSTEMS, guidance_embedding
from d2g_jax.pipeline import weights
from d2g_jax.pipeline.conditioning import tokenize_prompts
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.errors import UserError
from d2g_jax.sample.sampler import Parts, Sampler, draw_noise, latent_shape

PROMPTS = ["the cat", "the dog the cat"]
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
SDXL = ["dmd2-sdxl", "sdxl-turbo", "sdxl-lightning", "sdxl-lightning-epsilon"]


@pytest.fixture(scope="module")
def tiny_lcm(tiny_sd, tmp_path_factory):
    """`tiny_sd` as a latent consistency model: with a projection of the guidance, under LCM's pipeline class."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("tiny_lcm") / "model"
    teacher = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd)
    torch.manual_seed(1)
    unet = diffusers.UNet2DConditionModel.from_config({**teacher.unet.config, "time_cond_proj_dim": 12})
    diffusers.LatentConsistencyModelPipeline(
        teacher.vae, teacher.text_encoder, teacher.tokenizer, unet,
        diffusers.LCMScheduler.from_config(teacher.scheduler.config),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def ours(model, system):
    """(latents (2, C, h, w), the noise they were made of)."""
    sampler = Sampler.load(model, meshes.make_mesh(), parts=Parts(system=system))
    programs = sampler.programs(meshes.make_mesh())
    noise = draw_noise(0, len(PROMPTS), latent_shape(sampler.pipeline))
    return np.asarray(programs.solve(noise, programs.encode(tokenize_prompts(sampler.pipeline, PROMPTS)))), noise


def theirs(pipeline, noise, **arguments):
    import torch

    pipeline.set_progress_bar_config(disable=True)
    given = {"guidance_scale": 0.0, "num_inference_steps": 1} | arguments
    return pipeline(PROMPTS, latents=torch.from_numpy(noise.copy()), output_type="latent", **given).images.numpy()


def error(found, expected):
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


def scheduler_of(system, config):
    """What diffusers draws that system with, and the pipeline's arguments for it."""
    diffusers = pytest.importorskip("diffusers")
    config = {**config, "timestep_spacing": "trailing"}
    if system in ("dmd", "dmd2-sdxl", "lcm"):
        timesteps = {"dmd": [999], "dmd2-sdxl": [399]}.get(system)
        return diffusers.LCMScheduler.from_config(config), {"timesteps": timesteps} if timesteps else {}
    if system == "sdxl-turbo":
        return diffusers.EulerAncestralDiscreteScheduler.from_config(config), {}
    kind = "sample" if system == "sdxl-lightning" else "epsilon"
    return diffusers.EulerDiscreteScheduler.from_config(config, prediction_type=kind), {}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers against numpy 2
@pytest.mark.parametrize("system", [*SDXL, "dmd", "lcm"])
def test_one_call_equals_the_scheduler_s_step(system):
    """With a function in place of the network: what it sees, at which timestep, and what is made of its answer."""
    torch = pytest.importorskip("torch")
    scheduler, arguments = scheduler_of(system, SD)
    scheduler.set_timesteps(**(arguments or {"num_inference_steps": 1}))
    noise = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    (timestep,) = scheduler.timesteps
    latents = torch.from_numpy(noise) * scheduler.init_noise_sigma
    seen = scheduler.scale_model_input(latents, timestep)
    expected = scheduler.step(torch.sin(3.0 * seen) + 0.5 * seen, timestep, latents).prev_sample.numpy()

    def network(x, t):
        assert int(t) == int(timestep)
        np.testing.assert_allclose(x, seen.numpy(), rtol=1e-5, atol=1e-5)
        return jnp.sin(3.0 * x) + 0.5 * x

    found = SYSTEMS[system].generate(network, Schedule.from_config(SD), jnp.asarray(noise))
    assert error(found, expected) < 1e-5


WHOLE = [s if s == "sdxl-lightning" else pytest.param(s, marks=pytest.mark.slow) for s in SDXL]
"""The step above is each one's own; behind it all share their networks and programs."""


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("system", WHOLE)
def test_sdxl_systems_equal_whole_pipelines(system, tiny_sdxl):
    diffusers = pytest.importorskip("diffusers")
    found, noise = ours(tiny_sdxl, system)
    oracle = diffusers.StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)
    oracle.scheduler, arguments = scheduler_of(system, oracle.scheduler.config)
    expected = theirs(oracle, noise, **arguments)
    assert error(found, expected) < 1e-5
    assert np.std(expected) > 0.1


@pytest.mark.slow
def test_dmd_equals_a_whole_pipeline(tiny_sd):
    diffusers = pytest.importorskip("diffusers")
    found, noise = ours(tiny_sd, "dmd")
    oracle = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd)
    oracle.scheduler, arguments = scheduler_of("dmd", oracle.scheduler.config)
    assert error(found, theirs(oracle, noise, **arguments)) < 1e-5


def test_d2g_sample_of_instaflow_is_a_step_of_length_one_along_the_velocity(tiny_sd, tmp_path):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    flags = [f"--prompt={prompt}" for prompt in PROMPTS]
    assert main(["sample", f"--model={tiny_sd}", "--system=instaflow", f"--out={tmp_path}", *flags]) == 0
    found, noise = np.load(tmp_path / "latents.npy"), np.load(tmp_path / "noise.npy")
    oracle = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd)
    with torch.no_grad():
        text, _ = oracle.encode_prompt(PROMPTS, "cpu", 1, False)
        velocity = oracle.unet(torch.from_numpy(noise), torch.full((2,), 1000.0), text).sample
    assert error(found, noise + velocity.numpy()) < 1e-5


def test_lcm_equals_a_whole_pipeline(tiny_lcm):
    diffusers = pytest.importorskip("diffusers")
    found, noise = ours(tiny_lcm, "lcm")
    oracle = diffusers.LatentConsistencyModelPipeline.from_pretrained(tiny_lcm)
    expected = theirs(oracle, noise, guidance_scale=8.5)
    assert error(found, expected) < 1e-5
    assert error(expected, theirs(oracle, noise, guidance_scale=2.0)) > 1e-3


@pytest.mark.parametrize("size", [7, 256])
def test_guidance_embedding_equals_diffusers(size):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    method = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    expected = method(None, torch.full((3,), 7.5 - 1.0), embedding_dim=size).numpy()
    # Angles reach 6,500, where float32's neighbours are 5e-4 apart.
    np.testing.assert_allclose(guidance_embedding(7.5, size, 3), expected, atol=1e-3)


def test_a_unet_of_its_own(tiny_lcm, tiny_sd, tmp_path):
    """As LCM's and SDXL-Lightning's are published: a folder with a config, or a file for the base model's config."""
    whole, swapped = Pipeline.load(tiny_lcm), Pipeline.load(tiny_sd, unet=tiny_lcm / "unet")
    assert swapped.unet.config == whole.unet.config != Pipeline.load(tiny_sd).unet.config
    jax.tree.map(np.testing.assert_array_equal, swapped.params["unet"], whole.params["unet"])
    state = weights.load_state_dict(tiny_sd / "unet")
    weights.save_state_dict({key: 2 * value for key, value in state.items()}, tmp_path / "other.safetensors")
    doubled, own = Pipeline.load(tiny_sd, unet=tmp_path / "other.safetensors"), Pipeline.load(tiny_sd)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), doubled.params["unet"], own.params["unet"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--system=adm"], "instaflow, dmd"),
        (["--system=lcm"], "time_cond_proj_dim"),
        (["--system=dmd", "--steps=4"], "one-step"),
        (["--unet=nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_bad_flags(flags, message, tiny_sd, tmp_path, capsys):
    command = ["sample", f"--model={tiny_sd}", "--prompt=the cat", f"--out={tmp_path / 'out'}"]
    assert main([*command, *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_latent_consistency_model_needs_its_system(tiny_lcm):
    sampler = Sampler.load(tiny_lcm, meshes.make_mesh(), parts=Parts(system="dmd"))
    with pytest.raises(UserError, match="system=lcm"):
        sampler.programs(meshes.make_mesh())


def test_a_student_of_ours_says_itself_how_it_is_called(tiny_sd, tmp_path):
    folder = shutil.copytree(tiny_sd, tmp_path / "student")
    (folder / "d2g.json").write_text(json.dumps({"format": "diffusers", "timestep": 999}))
    with pytest.raises(UserError, match="system"):
        Sampler.load(folder, meshes.make_mesh(), parts=Parts(system="dmd"))


def test_a_timestep_beyond_the_schedule(tiny_sd, tmp_path):
    folder = shutil.copytree(tiny_sd, tmp_path / "short")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_train_timesteps": 100}))
    with pytest.raises(UserError, match="timestep 999"):
        Sampler.load(folder, meshes.make_mesh(), parts=Parts(system="dmd")).programs(meshes.make_mesh())


def test_every_system_of_the_table_is_tested():
    assert set(SYSTEMS) == {*SDXL, "dmd", "instaflow", "lcm"}
