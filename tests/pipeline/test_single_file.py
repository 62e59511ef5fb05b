"""One file in the original layout: read and written as diffusers does it, and nothing else taken for one."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from d2g_jax.export import export_student
from d2g_jax.models import clip, unet, vae
from d2g_jax.pipeline import weights
from d2g_jax.pipeline.folder import Pipeline, load_vae
from d2g_jax.pipeline.original_keys import original_places, prefixes
from d2g_jax.pipeline.single_file import kind_settings
from d2g_jax.pipeline.tokenizers import tokenize
from d2g_jax.plan.architectures import SD15, SD21, SD21_BASE, SDXL_BASE
from d2g_jax.runtime import mesh as meshes
from d2g_jax.sample.sampler import Sampler

PROMPTS = ["the cat", "the dog the cat"]
KINDS = {"sd1": SD15, "sd2": SD21_BASE, "sd2_v": SD21, "sdxl": SDXL_BASE}


def same(ours, theirs) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def tiny(tiny_sd: Path, tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random pipelines like the four kinds, in diffusers' layout. SD 2.x: OpenCLIP's GELU, linear projections."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    folders = {"sd1": tiny_sd, "sdxl": tiny_sdxl}
    for kind, prediction in (("sd2", "epsilon"), ("sd2_v", "v_prediction")):
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
        fields = dict(pipe.unet.config) | {"use_linear_projection": True, "attention_head_dim": (2, 4)}
        tower = transformers.CLIPTextConfig(**pipe.text_encoder.config.to_dict() | {"hidden_act": "gelu"})
        scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction)
        folders[kind] = tmp_path_factory.mktemp(kind)
        diffusers.StableDiffusionPipeline(
            pipe.vae, transformers.CLIPTextModel(tower), pipe.tokenizer, diffusers.UNet2DConditionModel(**fields),
            scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        ).save_pretrained(folders[kind])  # fmt: skip
    return folders


def export(source: Path, out: Path, timestep: int | None = None, **options) -> Path:
    """The single file of a folder."""
    export_student(Sampler(Pipeline.load(source), timestep), "single", out, **options)
    return out / f"{out.name}.safetensors"


@pytest.mark.parametrize("kind", KINDS)
def test_folder_to_file_to_folder_gives_every_bit_back(kind, tiny, tmp_path):
    file = export(tiny[kind], tmp_path / "one")
    assert sorted(path.name for path in file.parent.iterdir()) == ["one.safetensors"]  # a teacher has no workflow
    read = Sampler.load(file, meshes.make_mesh())
    before = Pipeline.load(tiny[kind])
    assert read.timestep is None
    same(read.pipeline.params, before.params)
    assert (read.pipeline.index, read.pipeline.scheduler) == (before.index, before.scheduler)
    export_student(read, "diffusers", tmp_path / "folder")
    again = Pipeline.load(tmp_path / "folder")
    same(again.params, before.params)
    assert [network.config for network in again.towers.values()] == [n.config for n in before.towers.values()]
    assert (again.unet.config, again.vae.config) == (before.unet.config, before.vae.config)
    for ours, theirs in zip(again.tokenizers, before.tokenizers, strict=True):
        np.testing.assert_array_equal(tokenize(ours, PROMPTS), tokenize(theirs, PROMPTS))
    same(load_vae(file)[2], before.params["vae"])


@pytest.mark.parametrize("kind", KINDS)
def test_their_from_single_file_draws_our_latents(kind, tiny, tmp_path):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    file = export(tiny[kind], tmp_path / "one")
    name = "StableDiffusionXLPipeline" if kind == "sdxl" else "StableDiffusionPipeline"
    theirs = getattr(diffusers, name).from_single_file(
        file, config=str(tiny[kind]), local_files_only=True, torch_dtype=torch.float32
    )
    theirs.scheduler = diffusers.DDIMScheduler.from_pretrained(tiny[kind], subfolder="scheduler")
    theirs.set_progress_bar_config(disable=True)
    model = Sampler.load(file, meshes.make_mesh())
    from d2g_jax.pipeline.draw import Solution
    from d2g_jax.sample.model import Model

    noise = np.random.default_rng(0).normal(size=(2, 4, 8, 8)).astype(np.float32)
    ours = Model(model, meshes.make_mesh(), "one").latents(PROMPTS, latents=noise, steps=3, guidance_scale=4.0)
    latents = theirs(
        PROMPTS, num_inference_steps=3, guidance_scale=4.0, latents=torch.tensor(noise), output_type="latent",
        height=32, width=32,
    ).images  # fmt: skip
    assert Solution().solver == "ddim"
    assert np.abs(ours - latents.numpy()).max() <= 1e-5 * np.abs(ours).max()


@pytest.mark.parametrize("kind", KINDS)
def test_full_size_names_are_those_of_their_conversion(kind):
    """Every tensor of the four architectures goes through diffusers' own conversion, as a shape without values."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from diffusers.loaders import single_file_utils as theirs

    architecture, settings = KINDS[kind], kind_settings(kind)
    towers = [*architecture.towers, None][:2]
    before = prefixes(*towers)
    configs = {"unet": architecture.unet, "vae": architecture.vae}
    configs |= dict(zip(("text_encoder", "text_encoder_2"), architecture.towers, strict=False))
    build = {"unet": unet.build, "vae": vae.build, "text_encoder": clip.build, "text_encoder_2": clip.build}
    shapes = {name: weights.torch_shapes(build[name](config).abstract()) for name, config in configs.items()}
    file: dict[str, torch.Tensor] = {}
    for name, config in configs.items():
        for key, place in original_places(config, shapes[name], before[name]).items():
            shape = shapes[name][key]
            if place.key.endswith(".text_projection"):
                shape = shape[::-1]
            elif place.third is not None:
                shape = (3 * shape[0], *shape[1:])
            elif re.search(r"mid\.attn_1\.\w+\.weight$", place.key) and len(shape) == 2:
                shape = (*shape, 1, 1)
            file[place.key] = torch.empty(shape, device="meta")
    converted = {
        "unet": theirs.convert_ldm_unet_checkpoint(dict(file), settings["unet"]),
        "vae": theirs.convert_ldm_vae_checkpoint(dict(file), settings["vae"]),
    }
    for name in ("text_encoder", "text_encoder_2")[: len(architecture.towers)]:
        if before[name].endswith(".transformer."):
            converted[name] = theirs.convert_ldm_clip_checkpoint(dict(file))
        else:
            tower = type("Tower", (), {"config": architecture.towers[-1]})
            converted[name] = theirs.convert_open_clip_checkpoint(tower, dict(file), prefix=before[name])
    for name, found in converted.items():
        assert {key: tuple(value.shape) for key, value in found.items()} == shapes[name], name


@pytest.mark.parametrize("kind", KINDS)
def test_shipped_configs_are_the_published_architectures(kind):
    settings, architecture = kind_settings(kind), KINDS[kind]
    assert unet.UNetConfig.from_json(settings["unet"], source=kind) == architecture.unet
    assert (
        vae.VaeConfig.from_json(settings["vae"], source=kind).block_out_channels == architecture.vae.block_out_channels
    )
    names = ("text_encoder", "text_encoder_2")[: len(architecture.towers)]
    for name, tower in zip(names, architecture.towers, strict=True):
        read = clip.ClipTextConfig.from_json(settings[name], source=kind)
        assert weights.torch_shapes(clip.build(read).abstract()) == weights.torch_shapes(clip.build(tower).abstract())
    assert settings["scheduler"]["prediction_type"] == architecture.prediction_type
