"""One file in the original layout: read and written as diffusers does it, and nothing else taken for one."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2g_jax.diffusion.schedule import PREDICTION_TYPES, Schedule, one_step
from d2g_jax.export import comfyui, export_student, folders
from d2g_jax.pipeline import single_file, weights
from d2g_jax.pipeline.folder import Pipeline, load_vae
from d2g_jax.pipeline.hub import NETWORKS, folder_hash
from d2g_jax.pipeline.original_keys import UNET_PREFIX, original_places, prefixes
from d2g_jax.pipeline.single_file import HEADER, kind_settings, unet_reader
from d2g_jax.pipeline.tokenizers import load_tokenizer, tokenize, words_of
from d2g_jax.plan.architectures import of_kind
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.errors import UserError
from d2g_jax.sample.model import Model
from d2g_jax.sample.sampler import Parts, Sampler

PROMPTS = ["the cat", "the dog the cat"]
KINDS = ("sd1", "sd2", "sd2_v", "sdxl")


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
    with pytest.raises(
        UserError, match=r"neither a pipeline folder .*; give .*/one/one\.safetensors for the file in it"
    ):
        Sampler.load(file.parent, meshes.make_mesh())
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


def slowly(*kinds):
    """All kinds, of which these take the time of the long run."""
    return [pytest.param(kind, marks=pytest.mark.slow if kind in kinds else ()) for kind in KINDS]


@pytest.mark.parametrize("kind", slowly("sd1", "sd2", "sd2_v"))
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
    noise = np.random.default_rng(0).normal(size=(2, 4, 8, 8)).astype(np.float32)
    ours = Model(model, meshes.make_mesh(), "one").latents(PROMPTS, latents=noise, steps=3, guidance_scale=4.0)
    latents = theirs(
        PROMPTS, num_inference_steps=3, guidance_scale=4.0, latents=torch.tensor(noise), output_type="latent",
        height=32, width=32,
    ).images  # fmt: skip
    assert np.abs(ours - latents.numpy()).max() <= 1e-5 * np.abs(ours).max()


@pytest.mark.parametrize("kind", slowly("sd1", "sd2_v"))
def test_full_size_names_are_those_of_their_conversion(kind):
    """Every tensor of the four architectures goes through diffusers' own conversion, as a shape without values."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from diffusers.loaders import single_file_utils as theirs

    pipeline, settings = of_kind(kind), kind_settings(kind)
    configs = {name: network.config for name, network in pipeline.networks.items()}
    before = prefixes(pipeline.networks)
    shapes = {name: weights.torch_shapes(network.abstract()) for name, network in pipeline.networks.items()}
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
    for name in pipeline.towers:
        if before[name].endswith(".transformer."):
            converted[name] = theirs.convert_ldm_clip_checkpoint(dict(file))
        else:
            tower = type("Tower", (), {"config": configs[name]})
            converted[name] = theirs.convert_open_clip_checkpoint(tower, dict(file), prefix=before[name])
    for name, found in converted.items():
        assert {key: tuple(value.shape) for key, value in found.items()} == shapes[name], name


# ---------------------------------------------------------------------------------------------------------------------
# Files of others


def write(file: Path, tensors: dict[str, tuple[int, ...]], dtype: str = "F16", metadata: dict | None = None) -> Path:
    """A safetensors file of zeros."""
    header, size, width = {"__metadata__": metadata or {}}, 0, {"F16": 2, "F8_E4M3": 1}[dtype]
    for key, shape in tensors.items():
        end = size + width * int(np.prod(shape))
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [size, end]}
        size = end
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    return file


def strip(file: Path, out: Path, **extra: np.ndarray) -> Path:
    """The file as another program would have written it: without our header, with what trainers leave behind."""
    weights.save_state_dict(weights.load_state_dict(file, dtype=None) | extra, out)
    return out


LEFT_BEHIND = {
    "model_ema.diffusion_modelinput_blocks00weight": np.zeros(2, np.float32),
    "betas": np.zeros(3, np.float32),
    "sqrt_one_minus_alphas_cumprod": np.zeros(3, np.float32),
    "global_step": np.zeros((), np.int64),
    "cond_stage_model.model.logit_scale": np.zeros((), np.float32),
    "cond_stage_model.model.text_projection": np.zeros((16, 16), np.float32),
    "cond_stage_model.model.transformer.resblocks.23.ln_1.weight": np.zeros(16, np.float32),
}


@pytest.fixture
def shipped_tiny(tiny, monkeypatch):
    """The tiny pipelines in the place of the shipped kinds."""
    shipped = {kind: folders.settings(Pipeline.load(folder)) for kind, folder in tiny.items()}
    monkeypatch.setattr(single_file, "kind_settings", shipped.__getitem__)

    def only(kind: str) -> None:
        monkeypatch.setattr(single_file, "_KINDS", {24 if kind == "sdxl" else 16: kind.removesuffix("_v")})

    return only


@pytest.mark.parametrize(
    ("kind", "dtype"), [("sd1", "float16"), ("sd2", "bfloat16"), ("sd2_v", "float32"), ("sdxl", "bfloat16")]
)
def test_a_file_of_others(kind, dtype, tiny, shipped_tiny, tmp_path):
    shipped_tiny(kind)
    before = Pipeline.load(tiny[kind])
    file = strip(export(tiny[kind], tmp_path / "one", dtype=dtype), tmp_path / "theirs.safetensors", **LEFT_BEHIND)
    if kind.startswith("sd2"):
        with pytest.raises(UserError, match=r"SD 2.x, whose tensors do not tell what it predicts; say prediction="):
            Pipeline.load(file)
    if kind == "sd2_v":
        file.with_suffix(".yaml").write_text("model:\n  params:\n    parameterization: v\n")
        assert Pipeline.load(file, without=NETWORKS, prediction="sample").scheduler["prediction_type"] == "sample"
    read = Pipeline.load(file, prediction="epsilon" if kind == "sd2" else None)
    half = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.dtype(dtype)).astype(np.float32), before.params)
    same(read.params, half)
    assert read.scheduler == before.scheduler
    assert len(folder_hash(file)) == 64
    network = before.unet
    same(unet_reader(file, network)(None), half["unet"])
    places = {key.removeprefix(UNET_PREFIX) for key in weights.read_header(file)[0] if key.startswith(UNET_PREFIX)}
    bare = {key.removeprefix(UNET_PREFIX): value for key, value in weights.load_state_dict(file, None).items()}
    weights.save_state_dict({k: v for k, v in bare.items() if k in places}, tmp_path / "bare.safetensors")
    same(unet_reader(tmp_path / "bare.safetensors", network)(None), half["unet"])


def test_v_prediction_markers_of_xl_are_believed(tiny, shipped_tiny, tmp_path):
    shipped_tiny("sdxl")
    marks = {"v_pred": np.zeros(0, np.float32), "ztsnr": np.zeros(0, np.float32)}
    file = strip(export(tiny["sdxl"], tmp_path / "one"), tmp_path / "theirs.safetensors", **marks)
    scheduler = Pipeline.load(file).scheduler
    assert (scheduler["prediction_type"], scheduler["rescale_betas_zero_snr"]) == ("v_prediction", True)


NETWORK = "    unet_config:\n      params:\n        context_dim: 1024\n"
SCALING = (
    "    denoiser_config:\n      params:\n        scaling_config:\n          target: sgm.modules.diffusionmodules."
)


@pytest.mark.parametrize(
    ("params", "found"),
    [
        (NETWORK, "epsilon"),
        (f"{NETWORK}    parameterization: v\n", "v_prediction"),
        ("    parameterization: x0\n", "sample"),
        (f"{SCALING}VScaling\n", "v_prediction"),
        (f"{SCALING}EpsScaling\n", "epsilon"),
        ("    parameterization: w\n", "correct or remove it"),
        ("    - 1\n", "no config of the original Stable Diffusion"),
        (NETWORK.replace("1024", "768"), "of a UNet for texts of width 768, the file's is for 1024; remove it"),
    ],
)
def test_what_an_original_config_says(params, found, tmp_path):
    file = write(tmp_path / "theirs.safetensors", {**UNET, list(UNET)[1]: (320, 1024)})
    file.with_suffix(".yaml").write_text(f"model:\n  params:\n{params}")
    if found in PREDICTION_TYPES:
        with single_file.settings_folder(file, None) as folder:
            scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
            unet = json.loads((folder / "unet" / "config.json").read_text())
        assert scheduler["prediction_type"] == found
        assert unet["sample_size"] == (96 if found == "v_prediction" else 64)
    else:
        with pytest.raises(UserError, match=rf"^{file.with_suffix('.yaml')}: .*{found}"):
            Pipeline.load(file)


def test_another_tokenizer(tiny, tmp_path):
    """That of a folder in the place of the one that a file says or CLIP's."""
    own = shutil.copytree(tiny["sd1"] / "tokenizer", tmp_path / "tokenizer") / "tokenizer_config.json"
    own.write_text(json.dumps(json.loads(own.read_text()) | {"model_max_length": 9}))
    file = export(tiny["sd1"], tmp_path / "one")
    assert (Pipeline.load(file).token_length, Pipeline.load(file, tokenizer=own.parent).token_length) == (16, 9)


UNET = {
    "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"model.diffusion_model.joint_blocks.0.x": (1,)}, "Stable Diffusion 3 .*, which is not read"),
        ({"double_blocks.0.x": (1,)}, "FLUX"),
        ({"conditioner.embedders.0.model.ln_final.weight": (1,)}, "the refiner of SDXL"),
        ({"embedder.model.visual.proj": (1,)}, "Stable unCLIP"),
        ({"lora_unet_down_blocks_0.lora_up.weight": (1, 1)}, "a LoRA"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)}, "an inpainting model of 9 input channels"),
        ({"conv_in.weight": (320, 4, 3, 3)}, "a UNet in diffusers' layout goes to unet"),
        ({**UNET, list(UNET)[1]: (320, 1234)}, "for texts of width 1234"),
        (UNET, "holds no text_encoder .cond_stage_model.transformer.*give a whole checkpoint"),
    ],
)
def test_what_is_not_read_is_said(tensors, words, tmp_path):
    file = write(tmp_path / "file.safetensors", tensors)
    with pytest.raises(UserError, match=f"{file}: .*{words}") as error:
        Pipeline.load(file)
    assert "\n" not in str(error.value)


def test_damaged_files(tiny, tmp_path):
    whole = export(tiny["sd1"], tmp_path / "one")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cut.safetensors: not a whole safetensors file"):
        Pipeline.load(cut)
    with pytest.raises(UserError, match=r"input_blocks.0.0.weight is stored as F8_E4M3; export it as float16"):
        Pipeline.load(write(tmp_path / "eight.safetensors", UNET, "F8_E4M3"))
    state, metadata = weights.load_state_dict(whole), weights.read_header(whole)[1]
    more = {**state, "model.diffusion_model.extra.weight": np.zeros(1, np.float32)}
    weights.save_state_dict(more, tmp_path / "more.safetensors", metadata=metadata)
    with pytest.raises(UserError, match=r"1 unknown tensors, model.diffusion_model.extra.weight; "):
        Pipeline.load(tmp_path / "more.safetensors")
    less = {key: value for key, value in state.items() if "decoder.conv_out" not in key}
    weights.save_state_dict(less, tmp_path / "less.safetensors", metadata=metadata)
    with pytest.raises(UserError, match=r"tensor first_stage_model.decoder.conv_out.* is missing; a pruned"):
        Pipeline.load(tmp_path / "less.safetensors")
    write(tmp_path / "header.safetensors", UNET, metadata={HEADER: "{"})
    with pytest.raises(UserError, match=r"its header's d2g_jax is damaged"):
        Pipeline.load(tmp_path / "header.safetensors")
    with pytest.raises(UserError, match=r"no single file, and says its prediction itself; leave out prediction"):
        Pipeline.load(tiny["sd1"], prediction="epsilon")
    with pytest.raises(UserError, match=r"attn2.to_k.weight has shape"):  # a UNet of another base
        Pipeline.load(tiny["sd1"], unet=_other_width(state, tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match=r"missing is missing; a CLIP tokenizer|vocab.json is missing"):
        Pipeline.load(whole, tokenizer=tmp_path)


def _other_width(state: dict[str, np.ndarray], out: Path) -> Path:
    unet = {key: value for key, value in state.items() if key.startswith(UNET_PREFIX)}
    wide = {key: np.repeat(value, 2, 1) if "attn2.to_k" in key else value for key, value in unet.items()}
    weights.save_state_dict(wide, out)
    return out


def clip_tokenizer(**words):
    with single_file.as_folder({"tokenizer": words}) as folder:
        return load_tokenizer(folder / "tokenizer")


def test_the_shipped_tokenizer_is_clips():
    tokenizer = clip_tokenizer()
    ids = tokenize(tokenizer, ["a photo of a cat"])[0]
    assert ids[:8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    assert (len(tokenizer), ids.shape) == (49408, (77,))
    assert words_of(tokenizer) == {"pad_token": "<|endoftext|>", "model_max_length": 77}
    assert tokenize(clip_tokenizer(pad_token="!"), ["a"])[0, -1] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Students


def test_a_student_says_how_it_is_called(tiny, tmp_path):
    file = export(tiny["sd1"], tmp_path / "student", timestep=399)
    folder = sorted(path.name for path in file.parent.iterdir())
    assert folder == ["README.md", "student.safetensors", "student.workflow.json"]
    assert "starts at timestep 399" in (file.parent / "README.md").read_text()
    student = Sampler.load(file, meshes.make_mesh())
    assert student.timestep == 399
    with pytest.raises(UserError, match=r"leave out system"):
        Sampler.load(file, meshes.make_mesh(), parts=Parts(system="dmd"))
    export_student(student, "diffusers", tmp_path / "folder")
    assert Sampler.load(tmp_path / "folder", meshes.make_mesh()).timestep == 399
    alone = export(tiny["sd1"], tmp_path / "alone", timestep=399, only="unet")
    assert all(key.startswith(UNET_PREFIX) for key in weights.read_header(alone)[0])
    assert "--model=TEACHER --unet=alone.safetensors" in (alone.parent / "README.md").read_text()
    beside = Sampler.load(tiny["sd1"], meshes.make_mesh(), parts=Parts(unet=alone))
    assert beside.timestep == 399
    same(beside.pipeline.params, student.pipeline.params)
    with pytest.raises(UserError, match=r"a UNet alone; give it as unet, beside a model"):
        Sampler.load(alone, meshes.make_mesh())
    shutil.copytree(tiny["sd1"], velocity := tmp_path / "velocity")
    file = velocity / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    with pytest.raises(UserError, match=r"predicts epsilon, and .* v_prediction"):
        Sampler.load(velocity, meshes.make_mesh(), parts=Parts(unet=alone))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to": "single", "out": "a.safetensors"}, "to=single writes a folder, .* leave out .safetensors"),
        ({"to": "flax", "only": "unet"}, "only=unet with to=flax: a single file of the UNet alone is"),
        ({"to": "single", "size": (32, 32)}, "height and width are for to=stablehlo"),
    ],
)
def test_refused_exports(options, words, tiny, tmp_path):
    options = {"out": "new", **options}
    with pytest.raises(UserError, match=words):
        export_student(
            Sampler(Pipeline.load(tiny["sd1"]), 999), options.pop("to"), tmp_path / options.pop("out"), **options
        )
    assert list(tmp_path.iterdir()) == []


CORE = {
    "CheckpointLoaderSimple": ("ckpt_name", "MODEL CLIP VAE"),
    "UNETLoader": ("unet_name weight_dtype", "MODEL"),
    "CLIPLoader": ("clip_name type", "CLIP"),
    "DualCLIPLoader": ("clip_name1 clip_name2 type", "CLIP"),
    "VAELoader": ("vae_name", "VAE"),
    "ModelSamplingDiscrete": ("model:MODEL sampling zsnr", "MODEL"),
    "CLIPTextEncode": ("clip:CLIP text", "CONDITIONING"),
    "EmptyLatentImage": ("width height batch_size", "LATENT"),
    "KSamplerSelect": ("sampler_name", "SAMPLER"),
    "BasicScheduler": ("model:MODEL scheduler steps denoise", "SIGMAS"),
    "SetFirstSigma": ("sigmas:SIGMAS sigma", "SIGMAS"),
    "RandomNoise": ("noise_seed", "NOISE"),
    "AddNoise": ("model:MODEL noise:NOISE sigmas:SIGMAS latent_image:LATENT", "LATENT"),
    "SamplerCustom": (
        "model:MODEL add_noise noise_seed cfg positive:CONDITIONING negative:CONDITIONING sampler:SAMPLER "
        "sigmas:SIGMAS latent_image:LATENT",
        "LATENT LATENT",
    ),
    "VAEDecode": ("samples:LATENT vae:VAE", "IMAGE"),
    "SaveImage": ("images:IMAGE filename_prefix", ""),
}
"""Inputs that ComfyUI's core requires of its nodes, with the type of a link, and the types of their outputs."""


@pytest.mark.parametrize("timestep", [999, 399])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_every_node_has_what_comfyui_requires(kind, whole, timestep):
    nodes = comfyui.workflow(of_kind(kind), timestep, "student.safetensors", whole=whole)
    for node in nodes.values():
        wanted = dict(word.partition(":")[::2] for word in CORE[node["class_type"]][0].split())
        assert node["inputs"].keys() == wanted.keys()
        for name, value in node["inputs"].items():
            assert isinstance(value, list) == bool(wanted[name])
            if wanted[name]:
                outputs = CORE[nodes[value[0]]["class_type"]][1].split()
                assert outputs[value[1]] == wanted[name]


class Comfy:
    """What ComfyUI's core does with the nodes that a workflow has, on arrays and with a network that is given."""

    def __init__(self, workflow: dict, noise: np.ndarray, output: np.ndarray):
        self.nodes, self.noise, self.output = workflow, noise.astype(np.float64), output
        self.called: list[int] = []

    def run(self, link: list) -> object:
        node = self.nodes[link[0]]
        values = {k: self.run(v) if isinstance(v, list) else v for k, v in node["inputs"].items() if k not in SKIPPED}
        return getattr(self, node["class_type"])(**values)

    def ModelSamplingDiscrete(self, sampling, zsnr):
        alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
        if zsnr:
            roots = np.sqrt(alphas)
            alphas = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
            alphas[-1] = 4.8973451890853435e-08
        return sampling, np.sqrt((1 - alphas) / alphas)

    def BasicScheduler(self, model, scheduler, steps, denoise):
        assert (scheduler, steps, denoise) == ("simple", 1, 1.0)
        return [model[1][-1], 0.0]

    def SetFirstSigma(self, sigmas, sigma):
        return [sigma, *sigmas[1:]]

    def KSamplerSelect(self, sampler_name):
        return sampler_name

    def EmptyLatentImage(self, width, height, batch_size):
        assert (width, height, batch_size) == (32, 32, 1)
        return np.zeros_like(self.noise)

    def RandomNoise(self, noise_seed):
        return self.noise

    def AddNoise(self, model, noise, sigmas, latent_image):
        return noise * (sigmas[0] - sigmas[-1]) + latent_image

    def SamplerCustom(self, model, add_noise, noise_seed, cfg, sampler, sigmas, latent_image):
        assert (cfg, sampler, len(sigmas), sigmas[1]) == (1.0, "euler", 2, 0.0)
        (sampling, known), sigma = model, sigmas[0]
        most = np.isclose(known[-1], sigma, rtol=1e-5) or sigma > known[-1]
        noisy = self.noise * add_noise * (np.sqrt(1 + sigma**2) if most else sigma) + latent_image
        self.called.append(int(np.abs(np.log(known) - np.log(sigma)).argmin()))
        self.seen = noisy / np.sqrt(1 + sigma**2)
        if sampling == "eps":
            return noisy - self.output * sigma
        return noisy / (sigma**2 + 1) - self.output * sigma / np.sqrt(sigma**2 + 1)


SKIPPED = ("positive", "negative", "clip")


@pytest.mark.parametrize("timestep", [999, 981, 399])
@pytest.mark.parametrize(("kind", "zero_snr"), [("sd1", False), ("sd2_v", False), ("sdxl", False), ("sd2_v", True)])
@pytest.mark.parametrize("whole", [True, False])
def test_the_workflow_draws_our_step(kind, zero_snr, timestep, whole, tiny):
    pipeline = Pipeline.load(tiny[kind], without=NETWORKS)
    scheduler = pipeline.scheduler | {"rescale_betas_zero_snr": zero_snr}
    pipeline = dataclasses.replace(pipeline, scheduler=scheduler)
    drawn = json.loads(json.dumps(comfyui.workflow(pipeline, timestep, "student.safetensors", whole=whole)))
    kinds = {node["class_type"] for node in drawn.values()}
    assert ("CheckpointLoaderSimple" in kinds, "UNETLoader" in kinds) == (whole, not whole)
    assert ("DualCLIPLoader" in kinds) == (kind == "sdxl" and not whole)
    assert all(value[0] in drawn for node in drawn.values() for value in node["inputs"].values() if type(value) is list)
    noise, output = np.random.default_rng(0).normal(size=(2, 1, 4, 4, 4)).astype(np.float32)
    (decode,) = (node for node in drawn.values() if node["class_type"] == "VAEDecode")
    (sampling,) = (node for node in drawn.values() if node["class_type"] == "ModelSamplingDiscrete")
    del sampling["inputs"]["model"]  # the loader's
    comfy = Comfy(drawn, noise, output)
    theirs = comfy.run(decode["inputs"]["samples"])
    assert comfy.called == [timestep]
    np.testing.assert_allclose(comfy.seen, noise, rtol=1e-5, atol=1e-6)
    ours = np.asarray(one_step(lambda x, t: output, Schedule.from_config(scheduler), timestep, noise))
    # ComfyUI's last alpha of a zero-SNR schedule is 4.9e-8 and not 0
    assert np.abs(ours - theirs).max() <= (1e-3 if zero_snr and timestep == 999 else 1e-5) * np.abs(ours).max()


def test_no_workflow_for_a_schedule_that_comfyui_lacks(tiny, tmp_path):
    pipeline = Pipeline.load(tiny["sd1"])
    pipeline = dataclasses.replace(pipeline, scheduler=pipeline.scheduler | {"beta_end": 0.02})
    export_student(Sampler(pipeline, 999), "single", tmp_path / "out", dtype="bfloat16")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "out.safetensors"]
