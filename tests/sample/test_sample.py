"""`d2g sample` against whole diffusers pipelines: same prompts and noise, twenty guided steps, the decoded image."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from d2g_jax.__main__ import main
from d2g_jax.digits.config import WEIGHTS
from d2g_jax.pipeline.draw import Solution
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.pipeline.single_file import HEADER
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.errors import UserError
from d2g_jax.sample.sampler import Parts, Sampler

PROMPTS = ["the cat", "the dog the cat"]


def drawn(model, out, *flags):
    """(uint8 images, noise, latents) of `d2g sample`."""
    assert main(["sample", f"--model={model}", f"--out={out}", *(f"--prompt={p}" for p in PROMPTS), *flags]) == 0
    images = []
    for i in range(len(PROMPTS)):
        with Image.open(out / f"{i:05d}.png") as image:
            images.append(np.asarray(image).astype(int))
    return np.stack(images), np.load(out / "noise.npy"), np.load(out / "latents.npy")


def theirs(pipeline, torch, noise, **arguments):
    pipeline.set_progress_bar_config(disable=True)
    height, width = (4 * side for side in noise.shape[2:])
    images = pipeline(
        PROMPTS, latents=torch.from_numpy(noise), output_type="np", height=height, width=width, **arguments
    ).images
    return np.round(images * 255).astype(int)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers against numpy 2
def test_sd_with_euler_rescaled_guidance_and_a_portrait_format(tiny_sd, tmp_path):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    flags = ["--steps=20", "--solver=euler", "--guidance=4", "--guidance-rescale=0.6", "--negative=dog"]
    ours, noise, _ = drawn(tiny_sd, tmp_path, *flags, "--spacing=trailing", "--height=64", "--width=40", "--seed=3")
    assert ours.shape == (2, 64, 40, 3)
    oracle = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd)
    oracle.scheduler = diffusers.EulerDiscreteScheduler.from_config(
        oracle.scheduler.config, timestep_spacing="trailing"
    )
    expected = theirs(
        oracle, torch, noise, num_inference_steps=20, guidance_scale=4.0, guidance_rescale=0.6,
        negative_prompt=["dog", "dog"],
    )  # fmt: skip
    assert np.abs(ours - expected).max() <= 1
    assert expected.std() > 10


def test_text_from_the_host_and_text_just_encoded_are_solved_by_one_program(tiny_sd):
    mesh = meshes.make_mesh()
    sampler = Sampler.load(tiny_sd, mesh)
    programs, batch = sampler.programs(mesh, Solution(steps=1)), 2 * mesh.size
    ids = np.zeros((batch, sampler.pipeline.token_length), np.int32)
    encoded = programs.encode(meshes.place_batch({"ids": ids}, mesh)["ids"])
    placed = meshes.place_batch({"text": np.asarray(encoded.encoder_hidden_states)}, mesh)["text"]
    assert encoded.encoder_hidden_states.sharding == placed.sharding


def test_large_images_in_tiles(tiny_sd, tmp_path):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    ours, noise, _ = drawn(tiny_sd, tmp_path, "--steps=2", "--tiled", "--height=64", "--width=56")
    oracle = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd)
    oracle.vae.enable_tiling()
    tiled = theirs(oracle, torch, noise, num_inference_steps=2, guidance_scale=7.5)
    oracle.vae.disable_tiling()
    assert np.abs(ours - tiled).max() <= 1
    assert np.abs(ours - theirs(oracle, torch, noise, num_inference_steps=2, guidance_scale=7.5)).max() > 1


@pytest.mark.parametrize("negative", ["", "the dog"])
def test_sdxl_with_and_without_a_negative_prompt(tiny_sdxl, tmp_path, negative):
    """Without one, SDXL's other half of guidance is all zeros, not the empty text."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    flags = [f"--negative={negative}"] if negative else []
    ours, noise, latents = drawn(tiny_sdxl, tmp_path, "--steps=20", "--guidance=5", "--width=48", *flags)
    oracle = diffusers.StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)
    expected = theirs(
        oracle, torch, noise, num_inference_steps=20, guidance_scale=5.0,
        negative_prompt=[negative] * 2 if negative else None,
    )  # fmt: skip
    assert ours.shape == expected.shape == (2, 32, 48, 3)
    assert np.abs(ours - expected).max() <= 1
    assert np.isfinite(latents).all()


def test_half_precision_keeps_kernels_in_half_and_draws_nearly_the_same(tiny_sd, tmp_path):
    import jax
    import jax.numpy as jnp

    sampler = Sampler.load(tiny_sd, meshes.make_mesh(), jnp.bfloat16)
    kept = {path[-1].key: leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(sampler.pipeline.params)}
    assert (kept["kernel"], kept["embedding"], kept["bias"]) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    full, _, _ = drawn(tiny_sd, tmp_path / "full", "--steps=4", "--solver=dpmpp_2m")
    half, _, _ = drawn(tiny_sd, tmp_path / "half", "--steps=4", "--solver=dpmpp_2m", "--dtype=bfloat16")
    assert 0 < np.abs(full - half).mean() < 4  # levels of 255


def test_weights_go_straight_into_the_shards():
    """A full kernel is on no device of a (1, 2) mesh, and the values are those of one device."""
    import jax

    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    sharded = Pipeline.load(WEIGHTS / "pipeline", mesh=meshes.make_mesh(1, 2)).params["unet"]
    whole = Pipeline.load(WEIGHTS / "pipeline").params["unet"]
    kernel = sharded["mid_block"]["resnets"]["0"]["conv1"]["kernel"]
    assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // 2}
    jax.tree.map(np.testing.assert_array_equal, sharded, whole)


def test_a_file_that_says_half_of_what_it_is_is_named(tmp_path):
    save_file({"a": np.zeros(1, np.float32)}, file := tmp_path / "a.safetensors", {HEADER: '{"timestep": 5}'})
    mesh, parts = meshes.make_mesh(), Parts(lora=(str(file),))
    with pytest.raises(UserError, match=r"a\.safetensors: prediction_type is missing"):
        Sampler.load(WEIGHTS / "pipeline", mesh, parts=parts)


def test_heun_and_many_images(tiny_sd, tmp_path, capsys):
    flags = ["--steps=3", "--solver=heun", "--images=3", "--batch=4"]
    main(["sample", f"--model={tiny_sd}", f"--out={tmp_path}", "--prompt=the cat", "--prompt=the dog", *flags])
    seconds = json.loads(capsys.readouterr().out)["seconds"]
    assert set(seconds) == {"load", "compile", "text", "unet", "vae"}
    assert all(value >= 0 for value in seconds.values())
    assert len(list(tmp_path.glob("0*.png"))) == 6
    assert (tmp_path / "prompts.txt").read_text().splitlines() == ["the cat"] * 3 + ["the dog"] * 3
    latents = np.load(tmp_path / "latents.npy")
    assert len({latent.tobytes() for latent in latents}) == 6


def test_a_file_without_spacing_means_what_it_means_to_diffusers(tiny_sd):
    """SD 1.5's has none: leading to DDIM, linspace to the others."""
    pipeline = Pipeline.load(tiny_sd)
    pipeline.scheduler.pop("timestep_spacing", None)
    spacings = {name: Solution(solver=name).schedule(pipeline).timestep_spacing for name in ("ddim", "euler")}
    assert spacings == {"ddim": "leading", "euler": "linspace"}


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--height=33", "height=33"),
        ("--width=100000000", "from 4 to 8192"),
        ("--width=0", "width=0"),
        ("--solver=ddpm", "'ddpm'"),
        ("--spacing=log", "log"),
        ("--steps=1001", "1001"),
        ("--images=0", "images=0"),
        ("--batch=0", "batch=0"),
        ("--dtype=int8", "int8"),
    ],
)
def test_bad_flags(flag, message, tiny_sd, tmp_path, capsys):
    assert main(["sample", f"--model={tiny_sd}", "--prompt=the cat", f"--out={tmp_path / 'out'}", flag]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "\n" not in error.rstrip("\n").splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_sigmas_that_are_not_implemented_are_refused(tiny_sd, tmp_path, capsys):
    import shutil

    shutil.copytree(tiny_sd, tmp_path / "model")
    file = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_karras_sigmas": True}))
    command = ["sample", f"--model={tmp_path / 'model'}", "--prompt=the cat", f"--out={tmp_path / 'out'}"]
    assert main([*command, "--solver=dpmpp_2m"]) == 2
    assert "use_karras_sigmas" in capsys.readouterr().err


def test_a_model_that_draws_nan_writes_nothing(tiny_sd, tmp_path, capsys):
    """Finite weights whose products are not: every latent overflows."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_sd, model)
    (file,) = (model / "unet").glob("*.safetensors")
    weights = load_file(file)
    weights["conv_out.weight"] = np.full_like(weights["conv_out.weight"], 3e38)
    save_file(weights, file, {"format": "pt"})
    assert main(["sample", f"--model={model}", "--prompt=the cat", "--steps=2", f"--out={out}"]) == 2
    assert (
        f"{model}: 1 of 1 images are not finite, the first for 'the cat'; check its weights" in capsys.readouterr().err
    )
    assert not out.exists()
