"""What an export draws elsewhere is what we draw here."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2g_jax.diffusion.schedule import Schedule, one_step, student_timestep
from d2g_jax.diffusion.systems import OneStep
from d2g_jax.digits.config import WEIGHTS
from d2g_jax.export import export_student, folders, to_diffusers, to_single
from d2g_jax.export.to_diffusers import one_step_scheduler
from d2g_jax.models import attention, layers, platform
from d2g_jax.pipeline import folder as pipelines
from d2g_jax.pipeline import weights
from d2g_jax.pipeline.conditioning import tokenize_prompts
from d2g_jax.pipeline.draw import draw, one_step_programs
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.errors import UserError
from d2g_jax.sample import exported
from d2g_jax.sample.sampler import Sampler, draw_noise

PROMPTS = ["the cat", "the dog the cat"]
SCALED_LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO_SNR = {**SCALED_LINEAR, "rescale_betas_zero_snr": True}


def student(folder: Path, timestep: int | None, **scheduler) -> Sampler:
    """A folder's pipeline with another UNet than the folder's, as training would leave it."""
    pipeline = Pipeline.load(folder)
    unet = jax.tree.map(lambda x: np.asarray(x) * np.float32(1.05), pipeline.params["unet"])
    scheduler = {**pipeline.scheduler, **scheduler}
    return Sampler(
        dataclasses.replace(pipeline, params={**pipeline.params, "unet": unet}, scheduler=scheduler), timestep
    )


def noise_for(pipeline: Pipeline, count: int) -> np.ndarray:
    height, width, channels = pipeline.latent_shape
    return np.random.default_rng(0).normal(size=(count, channels, height, width)).astype(np.float32)


def our_images(sampler: Sampler, noise: np.ndarray, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(latents, images) of `draw.one_step_programs`."""
    mesh = meshes.make_mesh()
    unet, step = sampler.pipeline.params["unet"], OneStep(sampler.timestep)
    programs = one_step_programs(sampler.pipeline, unet, step, mesh)
    (drawn,) = draw(programs, mesh, noise, tokenize_prompts(sampler.pipeline, prompts), len(noise), images=True)
    return drawn.latents, drawn.images.astype(int)


def same_bytes(ours, theirs) -> bool:
    return jax.tree.structure(ours) == jax.tree.structure(theirs) and all(
        a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---------------------------------------------------------------------------------------------------------------------
# diffusers


@pytest.mark.parametrize("timestep", [999, 981, 399, 0])
@pytest.mark.parametrize(
    ("betas", "prediction_type"),
    [
        (SCALED_LINEAR, "epsilon"),
        (SCALED_LINEAR, "v_prediction"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "sample"),
        ({"trained_betas": [1e-4 + 2e-5 * i for i in range(1000)]}, "epsilon"),
        (ZERO_SNR, "v_prediction"),
    ],
)
def test_one_step_of_their_scheduler(betas: dict, prediction_type: str, timestep: int):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    config = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **betas, "prediction_type": prediction_type}
    noise, output = np.random.default_rng(0).normal(size=(2, 2, 4, 4, 3)).astype(np.float32)
    ours = one_step(lambda x, t: output, Schedule.from_config(config), timestep, noise)
    written = json.loads(json.dumps(one_step_scheduler(config, timestep)))
    theirs = diffusers.DDIMScheduler.from_config(written)
    theirs.set_timesteps(1)
    assert theirs.timesteps.tolist() == [timestep]
    stepped = theirs.step(torch.tensor(output), theirs.timesteps[0], torch.tensor(noise)).prev_sample.numpy()
    assert np.abs(ours - stepped).max() <= 1e-5 * np.abs(stepped).max()
    again = Schedule.from_config(written)  # what `Sampler.load` makes of it
    assert np.abs(again.alphas_cumprod[timestep] - Schedule.from_config(config).alphas_cumprod[timestep]) <= 1e-6


@pytest.mark.parametrize(
    ("teacher", "timestep", "scheduler"),
    [
        ("tiny_sd", 999, {}),
        ("tiny_sd", 399, {}),
        ("tiny_sd", 981, {"prediction_type": "v_prediction"}),
        ("tiny_sdxl", 399, {"prediction_type": "v_prediction"}),
        ("digits", 999, {}),
    ],
)
def test_diffusers_draws_our_image(teacher: str, timestep: int, scheduler: dict, request, tmp_path: Path):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    digits = teacher == "digits"
    source = WEIGHTS / "pipeline" if digits else request.getfixturevalue(teacher)
    ours = student(source, timestep, **scheduler)
    prompts = ["a thin red seven, dots in sky and navy", "a bold green three on plain white"] if digits else PROMPTS
    assert export_student(ours, "diffusers", tmp_path / "out") == tmp_path / "out"
    noise = noise_for(ours.pipeline, 2)
    latents, images = our_images(ours, noise, prompts)

    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out").to(torch.float32)
    assert type(theirs).__name__ == ours.pipeline.index["_class_name"]
    theirs.set_progress_bar_config(disable=True)
    seen = []

    def keep(pipe, step, timestep, tensors):
        seen.append((int(timestep), tensors["latents"].numpy()))
        return {}

    their_images = theirs(
        prompts, num_inference_steps=1, guidance_scale=0.0, latents=torch.tensor(noise), callback_on_step_end=keep
    ).images
    ((step, their_latents),) = seen
    assert step == timestep
    assert np.abs(latents - their_latents).max() <= 1e-5 * np.abs(their_latents).max()
    their_pixels = np.stack([np.asarray(image) for image in their_images]).astype(int)
    assert np.abs(images - their_pixels).max() <= 1
    assert images.std() > 10

    again = Sampler.load(tmp_path / "out", meshes.make_mesh())
    assert again.timestep == timestep
    assert same_bytes(again.pipeline.params, ours.pipeline.params)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"`{source.name}`" in card
    assert f"timestep\n{timestep} " in card
    assert str(source.parent) not in card + (tmp_path / "out" / "d2g.json").read_text()


@pytest.mark.parametrize("teacher", ["tiny_sd", "tiny_sdxl"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_untouched_teacher_comes_back_byte_for_byte(teacher: str, dtype: str, request, tmp_path: Path):
    source = request.getfixturevalue(teacher)
    if dtype == "float16":
        loaded, source = Pipeline.load(source), tmp_path / "half"
        configs = {name: getattr(loaded, name).config for name in loaded.params} | {"scheduler": loaded.scheduler}
        names = ("tokenizer", "tokenizer_2")[: len(loaded.tokenizers)]
        files = {name: {file.name: file.read_bytes() for file in (loaded.folder / name).iterdir()} for name in names}
        pipelines.save_pipeline(source, configs, loaded.params, files, np.float16)
    export_student(Sampler(Pipeline.load(source), None), "diffusers", tmp_path / "out", dtype=dtype)
    before, after = files_of(source), files_of(tmp_path / "out")
    assert before.keys() == after.keys()
    unet = "unet/diffusion_pytorch_model.safetensors"
    different = {name for name in before if before[name] != after[name]}
    assert different <= {unet, "model_index.json"}  # the order of tensors, the indentation
    assert json.loads(before["model_index.json"]) == json.loads(after["model_index.json"])
    ours, theirs = (weights.load_state_dict(folder / unet, dtype=None) for folder in (tmp_path / "out", source))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name].dtype, ours[name].shape) == (theirs[name].dtype, theirs[name].shape)
        assert ours[name].tobytes() == theirs[name].tobytes()


def test_what_comes_along(tiny_sd: Path, tmp_path: Path):
    source, out = tmp_path / "owner", tmp_path / "out"
    shutil.copytree(tiny_sd, source)
    vae = source / "vae" / "diffusion_pytorch_model.safetensors"
    vae.rename(vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    (source / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    for name in ("safety_checker/model.safetensors", "safety_checker/config.json", "image_encoder/pytorch_model.bin"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(name.encode())
    (source / "LICENSE.md").write_text("do no harm")
    (source / "notes.txt").write_text("private")
    index = json.loads((source / "model_index.json").read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],  # no such folder: the hub was not asked for it
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    }
    (source / "model_index.json").write_text(json.dumps(index))
    export_student(student(source, 999), "diffusers", out, dtype="float16")
    written, original = files_of(out), files_of(source)
    assert (
        written["vae/diffusion_pytorch_model.safetensors"] == original["vae/diffusion_pytorch_model.fp16.safetensors"]
    )
    for name in ("safety_checker/model.safetensors", "safety_checker/config.json", "LICENSE.md", "unet/config.json"):
        assert written[name] == original[name]
    assert not {name for name in written if name.endswith(".bin") or name == "notes.txt"}
    index = json.loads(written["model_index.json"])
    assert index["safety_checker"] == ["stable_diffusion", "StableDiffusionSafetyChecker"]
    assert index["feature_extractor"] == index["image_encoder"] == [None, None]
    assert (
        "Not carried over from the teacher's folder: feature_extractor, image_encoder." in written["README.md"].decode()
    )
    stored = weights.load_state_dict(out / "unet", dtype=None)
    assert {value.dtype for value in stored.values()} == {np.dtype(np.float16)}


def test_the_index_of_a_variant_names_the_shards_as_they_are_copied(tmp_path: Path):
    source, names = tmp_path / "in", ["model.safetensors.index.fp16.json"]
    names += [f"model-0000{i}-of-00002.fp16.safetensors" for i in (1, 2)]
    source.mkdir()
    for name in names[1:]:
        (source / name).write_bytes(b"x")
    (source / names[0]).write_text(json.dumps({"weight_map": {"a.weight": names[1], "b.weight": names[2]}}))
    folders.copy(source, tmp_path / "out", names)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values(), "model.safetensors.index.json"} == files_of(tmp_path / "out").keys()


def test_a_name_in_the_hub_cache_is_its_id(tmp_path: Path):
    folder = tmp_path / "models--owner--sd-1.5" / "snapshots" / "0123abcd"
    assert exported.teacher_name(folder) == "owner/sd-1.5"
    assert exported.teacher_name(tmp_path / "mine") == "mine"


# ---------------------------------------------------------------------------------------------------------------------
# Flax


@pytest.fixture(scope="module")
def flax_sd(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_student(student(tiny_sd, 399), "flax", tmp_path_factory.mktemp("flax") / "student")


def test_flax_folder_comes_back_sharded(flax_sd: Path, tiny_sd: Path):
    ours, mesh = student(tiny_sd, 399), meshes.make_mesh(fsdp=2)
    again = Sampler.load(flax_sd, mesh)
    assert again.timestep == 399
    assert same_bytes(again.pipeline.params, ours.pipeline.params)
    wanted = meshes.tree_shardings(again.pipeline.params, mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, again.pipeline.params) == wanted
    assert any(not sharding.is_fully_replicated for sharding in jax.tree.leaves(wanted))
    single = exported.load_pipeline(flax_sd)
    assert {leaf.sharding.num_devices for leaf in jax.tree.leaves(single.params)} == {1}
    description = json.loads((flax_sd / "d2g.json").read_text())
    assert description["latent_shape"] == {"height": 8, "width": 8, "channels": 4}
    assert (description["format"], description["prediction_type"]) == ("flax", "epsilon")
    assert exported.read_description(flax_sd)["format"] == "flax"
    assert exported.read_description(tiny_sd) == {}


FULL = """
import resource, sys
from d2g_jax.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))
sys.exit(main(["export", f"--model={sys.argv[1]}", "--to=flax", f"--out={sys.argv[2]}"]))
"""


def test_flax_export_to_a_full_disk_is_one_line_and_leaves_nothing(tiny_sd: Path, tmp_path: Path):
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", FULL, str(tiny_sd), str(out)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{out}: a checkpoint cannot be written (File too large); make room" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_flax_sdxl_teacher_in_bfloat16(tiny_sdxl: Path, tmp_path: Path):
    teacher = Sampler(Pipeline.load(tiny_sdxl, storage=jnp.bfloat16), None)
    out = export_student(teacher, "flax", tmp_path / "out", dtype="bfloat16")
    assert exported.read_description(out)["timestep"] is None
    assert same_bytes(exported.load_pipeline(out, jnp.bfloat16).params, teacher.pipeline.params)


def test_flax_to_diffusers(flax_sd: Path, tiny_sd: Path, tmp_path: Path):
    out = export_student(Sampler.load(flax_sd, meshes.make_mesh()), "diffusers", tmp_path / "out")
    again = Sampler.load(out, meshes.make_mesh())
    assert again.timestep == 399
    assert same_bytes(again.pipeline.params, student(tiny_sd, 399).pipeline.params)
    assert json.loads((out / "d2g.json").read_text())["teacher"] == tiny_sd.name


def test_the_example_in_the_readme(flax_sd: Path, tmp_path: Path, monkeypatch):
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "d2g_jax.load(" in code)
    monkeypatch.chdir(tmp_path)
    (workdir,) = re.findall(r'load\("(.*?)"\)', code)
    Path(workdir).parent.mkdir(parents=True)
    Path(workdir).symlink_to(flax_sd)
    names: dict = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* longer than 16 tokens")  # this tokenizer spells
        exec(compile(code, "README.md", "exec"), names)
        prompts = eval(re.findall(r"student\((\[.*?\])", code)[0])
        _, images = our_images(names["student"].sampler, draw_noise(0, len(prompts), (4, 8, 8)), prompts)
    assert np.abs(np.stack(names["images"]).astype(int) - images).max() <= 1
    assert (tmp_path / "seven.png").stat().st_size > 100


def test_damaged_flax_folder(flax_sd: Path, tmp_path: Path):
    folder = tmp_path / "folder"
    shutil.copytree(flax_sd, folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"layers_per_block": 2}))
    with pytest.raises(UserError, match=r"params: not the parameters of the networks beside it"):
        exported.load_pipeline(folder)
    shutil.rmtree(folder / "params")
    with pytest.raises(UserError, match=r"params: folder is missing"):
        exported.load_pipeline(folder)
    for content, words in {
        "{": "cannot be read",
        "[]": "expected a JSON object",
        '{"timestep": "399"}': "timestep must be",
        '{"timestep": 399, "version": 2}': "version 2 is not 1",
        '{"timestep": 399, "format": "gguf"}': "format 'gguf' is unknown",
        '{"timestep": 399, "format": "diffusers"}': "format is not flax",
    }.items():
        (folder / "d2g.json").write_text(content)
        with pytest.raises(UserError, match=words):
            exported.load_pipeline(folder)


# ---------------------------------------------------------------------------------------------------------------------
# StableHLO

IN_A_FRESH_PROCESS = """
import runpy, sys
import numpy as np

for name, tokens in ("sd", "sd_tokens.npy"), ("xl", "xl_tokens.npy"):  # a batch of three, from Python
    draw = runpy.run_path(name + "_run.py")["load"](name + ".zip")
    np.save(name + "_three.npy", draw(np.load(tokens)[:3], np.load("noise.npy")[:3]))
sys.argv = ["run.py", "sd.zip", "sd_tokens.npy", "noise.npy", "sd_four.npy"]  # all four, as a command
try:
    runpy.run_path("sd_run.py", run_name="__main__")
except SystemExit as end:
    assert end.code == 0
print([name for name in ("d2g_jax", "flax", "transformers", "torch", "orbax", "safetensors") if name in sys.modules])
"""


def export_program(folder: Path, dtype: str, name: str, work: Path) -> tuple[dict, np.ndarray]:
    """Writes a zip, its run.py and tokens into `work`; returns meta.json and our own four images."""
    ours, file = student(folder, 399), work / f"{name}.zip"
    assert export_student(ours, "stablehlo", file, dtype=dtype) == file
    with zipfile.ZipFile(file) as archive:
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        assert "tokenizer/tokenizer.json" in archive.namelist()
        (work / f"{name}_run.py").write_bytes(archive.read("run.py"))
        meta = json.loads(archive.read("meta.json"))
    like = Pipeline.load(folder, jnp.dtype(dtype), storage=jnp.dtype(dtype), without=("unet",))
    unet = exported.store(ours.pipeline.params["unet"], jnp.dtype(dtype))
    like = Sampler(dataclasses.replace(like, params={**like.params, "unet": unet}), 399)
    np.save(work / f"{name}_tokens.npy", tokenize_prompts(like.pipeline, PROMPTS * 2))
    return meta, our_images(like, np.load(work / "noise.npy"), PROMPTS * 2)[1]


@pytest.mark.slow
def test_program_draws_our_images_in_a_fresh_process(tiny_sd: Path, tiny_sdxl: Path, tmp_path: Path):
    """SD in float32 and SDXL in bfloat16, with other batch sizes than any that was traced."""
    np.save(tmp_path / "noise.npy", np.random.default_rng(0).normal(size=(4, 4, 8, 8)).astype(np.float32))
    meta, sd = export_program(tiny_sd, "float32", "sd", tmp_path)
    meta_xl, xl = export_program(tiny_sdxl, "bfloat16", "xl", tmp_path)
    for description in (meta, meta_xl):
        assert description["platforms"] == ["cuda", "tpu", "cpu"]
        assert description["output"]["shape"][1:] == [32, 32, 3]
        assert (description["batch"] == "any") == (description["batch_fixed_because"] is None)
    assert meta["inputs"]["tokens"]["shape"] == ["any", 16]
    assert meta_xl["token_lengths"] == [16, 16]
    done = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", IN_A_FRESH_PROCESS],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    three, four, three_xl = (np.load(tmp_path / f"{name}.npy") for name in ("sd_three", "sd_four", "xl_three"))
    assert three.dtype == np.uint8
    assert four.std() > 10
    assert np.abs(three - sd[:3]).max() <= 1
    assert np.abs(four - sd).max() <= 1
    # 8 bits of mantissa, rounded at other places because one program is fused otherwise than three
    assert np.abs(three_xl - xl[:3]).max() <= 8
    assert np.abs(three_xl - xl[:3]).mean() <= 0.5


def test_weights_are_arguments_and_only_those_that_draw(tiny_sd: Path, tmp_path: Path):
    file = export_student(student(tiny_sd, 999), "stablehlo", tmp_path / "out.zip", size=(64, 32))
    with zipfile.ZipFile(file) as archive:
        (tmp_path / "params.safetensors").write_bytes(archive.read("params.safetensors"))
        meta = json.loads(archive.read("meta.json"))
        program = jax.export.deserialize(bytearray(archive.read("sampler.stablehlo")))
    assert meta["inputs"]["noise"]["shape"] == ["any", 4, 16, 8]
    assert meta["output"]["shape"] == ["any", 64, 32, 3]
    stored = weights.load_state_dict(tmp_path / "params.safetensors", dtype=None)  # the safetensors library's reader
    assert len(program.in_avals) == len(stored) + 2
    assert not [name for name in stored if name.startswith("vae/encoder")]
    np.testing.assert_array_equal(
        stored["unet/conv_in/kernel"], student(tiny_sd, 999).pipeline.params["unet"]["conv_in"]["kernel"]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Refusals, and tracing for another platform


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"to": "onnx"}, "to=onnx is unknown; choose one of diffusers, single, flax, lora, stablehlo"),
        ({"dtype": "int8"}, "dtype=int8 is unknown"),
        ({"timestep": 1000}, "timestep 1000 is out of range: the teacher's schedule has 0 to 999"),
        ({"to": "stablehlo", "timestep": None}, "this is a teacher; take diffusers, flax or single"),
        ({"to": "stablehlo", "size": (30, None)}, "height=30: give a multiple of 4"),
        ({"size": (64, 64)}, "height and width are for to=stablehlo"),
        ({"out": "full"}, "full: is not empty; give a new place"),
        ({"to": "stablehlo", "out": "full"}, "full: is a folder, and to=stablehlo writes one file"),
        ({"to": "stablehlo", "out": "full/file"}, "file: exists; give a new name"),
        ({"out": "full/file"}, "file: is a file, and to=diffusers writes a folder"),
        ({"out": "full/file/out"}, "out: cannot be written"),
    ],
)
def test_refusals(change: dict, words: str, tiny_sd: Path, tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    asked = {"to": "diffusers", "out": "new", "timestep": 999, "dtype": "float32", "size": (None, None)} | change
    sampler = Sampler(Pipeline.load(tiny_sd), asked["timestep"])
    with pytest.raises(UserError, match=re.escape(words)) as error:
        export_student(sampler, asked["to"], tmp_path / asked["out"], dtype=asked["dtype"], size=asked["size"])
    assert "\n" not in str(error.value)
    assert files_of(tmp_path) == {"full/file": b"mine"}


@pytest.mark.parametrize("to", ["diffusers", "flax", "stablehlo"])
def test_overflow_leaves_nothing_behind(to: str, tiny_sd: Path, tmp_path: Path):
    sampler = student(tiny_sd, 999)
    sampler.pipeline.params["unet"]["conv_in"]["kernel"][0] = 1e6
    with pytest.raises(UserError, match=r"conv_in.(kernel|weight) overflows in float16"):
        export_student(sampler, to, tmp_path / "out", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_layers_are_traced_for_another_platform():
    shapes = (1, 8, 8, 1280), (3, 3, 1280, 1280)
    with contextlib.ExitStack() as stack:
        stack.enter_context(platform.compiling_for("gpu"))
        assert attention.attention_implementation("auto", 64, jnp.bfloat16, 64, 64) == "cudnn"
        with platform.compiling_for("cpu"):
            assert layers.prefers_matmul(*shapes)
            assert attention.attention_implementation("auto", 64, jnp.bfloat16, 64, 64) == "xla"
        assert platform.platform() == "gpu"
        assert not layers.prefers_matmul(*shapes)
    assert platform.platform() == jax.default_backend()


@pytest.mark.parametrize("name", ['a"b', "a\\b", "plain", "it's", "a `date` b"])
def test_a_model_card_of_a_folder_with_a_quote_in_its_name_is_code(name):
    described = {
        "dtype": "float32",
        "teacher": "t",
        "versions": {"d2g_jax": "1"},
        "timestep": 9,
        "prediction_type": "v",
    }
    card = to_diffusers.model_card(described, "StableDiffusionPipeline", name, [])
    code = card.split("```python\n")[1].split("```")[0]
    assert f"from_pretrained({json.dumps(name)}, " in code
    compile(code, "README.md", "exec")
    for whole, flag in ((True, "--model"), (False, "--unet")):
        card = to_single.model_card(described, name, whole=whole)
        (command,) = (line for line in card.splitlines() if line.startswith("    d2g sample"))
        assert f"{flag}={name}.safetensors" in shlex.split(command)


def test_a_student_that_diffusers_saved_again_is_still_one(tiny_sd: Path, tmp_path: Path):
    diffusers = pytest.importorskip("diffusers")
    teacher = json.loads((tiny_sd / "scheduler" / "scheduler_config.json").read_text())
    for timestep in (399, 999):
        config = one_step_scheduler(teacher, timestep)
        (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
        diffusers.DDIMScheduler.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
        again = json.loads((tmp_path / "again" / "scheduler_config.json").read_text())
        assert student_timestep(again) == timestep
    assert student_timestep(teacher) is None
