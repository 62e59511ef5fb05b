"""A whole folder, ours against diffusers', in both directions."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from d2g_jax.digits.config import WEIGHTS
from d2g_jax.models import vae
from d2g_jax.pipeline import folder as pipelines
from d2g_jax.pipeline import tokenizers, weights, words
from d2g_jax.pipeline.conditioning import encode_text, tokenize_prompts
from d2g_jax.pipeline.draw import Solution
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.runtime.errors import UserError

PROMPTS = ["the cat", "the dog the cat", ""]


@pytest.fixture(scope="module")
def loaded(tiny_sd: Path) -> Pipeline:
    return Pipeline.load(tiny_sd)


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def configs_of(pipeline: Pipeline) -> dict:
    configs = {name: getattr(pipeline, name).config for name in pipeline.params}
    return configs | {"scheduler": pipeline.scheduler}


def save(pipeline: Pipeline, folder: Path, dtype=np.float32) -> None:
    names = ("tokenizer", "tokenizer_2")[: len(pipeline.tokenizers)]
    files = {name: {file.name: file.read_bytes() for file in (pipeline.folder / name).iterdir()} for name in names}
    pipelines.save_pipeline(folder, configs_of(pipeline), pipeline.params, files, dtype)


def trees_equal(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_loaded_folder(loaded: Pipeline):
    assert loaded.latent_shape == (8, 8, 4)
    assert loaded.scaling_factor == 0.18215
    assert loaded.scheduler["_class_name"] == "DDIMScheduler"
    assert set(loaded.params) == {"text_encoder", "unet", "vae"}


def test_our_folder_in_diffusers_and_back(loaded: Pipeline, tmp_path: Path):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    save(loaded, tmp_path / "ours")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "ours")
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(3, 8, 8, 4)).astype(np.float32)
    ids = tokenizers.tokenize(loaded.tokenizer, PROMPTS)
    text = jax.jit(lambda params, ids: encode_text(loaded, params, ids))(loaded.params, ids)
    predict = jax.jit(loaded.unet.apply)
    predicted = predict(loaded.params["unet"], latents, np.full(3, 981), text.encoder_hidden_states)
    unscaled = vae.unscale_latents(loaded.vae.config, latents)
    decoded, images = jax.jit(
        lambda params, z: (
            loaded.vae.apply(params["vae"], unscaled, method="decode"),
            pipelines.decode(loaded, params, z),
        )
    )(loaded.params, latents)
    nchw = torch.tensor(latents.transpose(0, 3, 1, 2))
    with torch.no_grad():
        their_text = theirs.encode_prompt(PROMPTS, "cpu", 1, False)[0]
        their_predicted = theirs.unet(nchw, 981, their_text).sample
        their_decoded = theirs.vae.decode(nchw / theirs.vae.config.scaling_factor).sample
    their_images = theirs.image_processor.postprocess(their_decoded, output_type="pil")
    assert relative(text.encoder_hidden_states, their_text) <= 1e-5
    assert relative(predicted, their_predicted.numpy().transpose(0, 2, 3, 1)) <= 1e-5
    assert relative(decoded, their_decoded.numpy().transpose(0, 2, 3, 1)) <= 1e-5
    their_pixels = np.stack([np.asarray(image) for image in their_images]).astype(int)
    assert images.images.dtype == np.uint8
    assert np.asarray(images.finite).all()
    assert np.abs(np.asarray(images.images).astype(int) - their_pixels).max() <= 1
    assert their_pixels.std() > 10  # an image, not a constant
    theirs.save_pretrained(tmp_path / "theirs")
    again = Pipeline.load(tmp_path / "theirs")
    assert trees_equal(again.params, loaded.params)
    assert configs_of(again) | {"scheduler": 0} == configs_of(loaded) | {"scheduler": 0}


def test_sdxl_folder_in_diffusers_and_back(tiny_sdxl: Path, tmp_path: Path):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    loaded = Pipeline.load(tiny_sdxl)
    save(loaded, tmp_path)
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path, add_watermarker=False)
    ids = tokenize_prompts(loaded, PROMPTS)
    time_ids = np.tile(np.float32([32, 32, 0, 4, 32, 32]), (3, 1))
    text = jax.jit(lambda params, ids: encode_text(loaded, params, ids, time_ids[0]))(loaded.params, ids)
    latents = np.random.default_rng(0).normal(size=(3, 8, 8, 4)).astype(np.float32)
    predicted = jax.jit(loaded.unet.apply)(loaded.params["unet"], latents, np.full(3, 399), *text)
    with torch.no_grad():
        hidden, _, pooled, _ = theirs.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
        their_added = {"text_embeds": pooled, "time_ids": torch.tensor(time_ids)}
        nchw = torch.tensor(latents.transpose(0, 3, 1, 2))
        their_predicted = theirs.unet(nchw, 399, hidden, added_cond_kwargs=their_added).sample
    assert relative(text.encoder_hidden_states, hidden) <= 1e-5
    assert relative(text.added["text_embeds"], pooled) <= 1e-5
    assert relative(predicted, their_predicted.numpy().transpose(0, 2, 3, 1)) <= 1e-5
    assert trees_equal(Pipeline.load(tmp_path).params, loaded.params)


def test_sdxl_pooled_width_must_fit(tiny_sdxl: Path, tmp_path: Path):
    folder = tmp_path / "folder"
    shutil.copytree(tiny_sdxl, folder)
    edit(folder / "unet" / "config.json", projection_class_embeddings_input_dim=40)
    with pytest.raises(UserError, match=r"projection_class_embeddings_input_dim 40 .* 36"):
        Pipeline.load(folder)


def test_half_precision_folder(loaded: Pipeline, tmp_path: Path):
    save(loaded, tmp_path, np.float16)
    stored = weights.load_state_dict(tmp_path / "unet", dtype=None)
    assert {value.dtype for value in stored.values()} == {np.dtype(np.float16)}
    again = Pipeline.load(tmp_path)
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(np.float16).astype(np.float32), loaded.params)
    assert trees_equal(again.params, rounded)


def test_uint8_is_diffusers_rounding():
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    ramp = np.concatenate([np.linspace(-1.3, 1.3, 12288 - 512), (np.arange(512) / 2 / 255) * 2 - 1])
    images = ramp.astype(np.float32).reshape(1, 64, 64, 3)
    theirs = diffusers.image_processor.VaeImageProcessor().postprocess(
        torch.tensor(images.transpose(0, 3, 1, 2)), output_type="pil"
    )
    np.testing.assert_array_equal(pipelines.to_uint8(images)[0], np.asarray(theirs[0]))


def test_tokenize(loaded: Pipeline):
    transformers = pytest.importorskip("transformers")
    oracle = transformers.CLIPTokenizer.from_pretrained(loaded.folder / "tokenizer")
    ids = tokenizers.tokenize(loaded.tokenizer, PROMPTS)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, oracle(PROMPTS, padding="max_length", max_length=16).input_ids)
    with pytest.warns(UserWarning, match="longer than 16 tokens, cut off 'dog'"):
        tokenizers.warn_of(loaded.tokenizer, ["the " * 14 + "dog"])
    long = tokenizers.tokenize(loaded.tokenizer, ["the " * 14 + "dog"])
    assert long.shape == (1, 16)
    assert long[0, -1] == oracle.eos_token_id
    assert tokenizers.tokenize(loaded.tokenizer, []).shape == (0, 16)


def test_our_tokenizer_files_are_clip(tiny_vocabulary, tmp_path: Path):
    vocab, merges = tiny_vocabulary
    for name, content in tokenizers.tokenizer_files(vocab, merges, 16).items():
        (tmp_path / name).write_bytes(content)
    tokenizer = tokenizers.load_tokenizer(tmp_path)
    assert tokenizer.model_max_length == 16
    assert tokenizer.tokenize("The cat, dog x") == ["the</w>", "cat</w>", "<|endoftext|>", "dog</w>", "x</w>"]
    end = vocab["<|endoftext|>"]
    expected = [vocab["<|startoftext|>"], vocab["cat</w>"], end, *[end] * 13]
    assert tokenizers.tokenize(tokenizer, ["cat"])[0].tolist() == expected


def test_neither_torch_nor_tensorflow(tiny_sd: Path):
    code = (
        "import sys; from pathlib import Path; import d2g_jax.pipeline.folder, d2g_jax.pipeline.tokenizers as p; "
        f"p.tokenize(p.load_tokenizer(Path({str(tiny_sd / 'tokenizer')!r})), ['the cat']); "
        "print([m for m in ('torch', 'tensorflow', 'diffusers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def edit(file: Path, **values) -> None:
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in content.items() if value != "DELETE"}))


def no_merges(folder: Path) -> None:
    file = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"] = []
    file.write_text(json.dumps(content))


def bare_vocabulary(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "vocab.json").write_text("{}")


BAD = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "model_index.json is missing"),
    "broken index": (lambda f: (f / "model_index.json").write_text("{"), "model_index.json cannot be read"),
    "index is a list": (lambda f: (f / "model_index.json").write_text("[]"), "expected a JSON object"),
    "other pipeline": (lambda f: edit(f / "model_index.json", _class_name="FluxPipeline"), "FluxPipeline"),
    "other unet": (lambda f: edit(f / "model_index.json", unet=["diffusers", "UNet3D"]), "UNet3D"),
    "null unet": (lambda f: edit(f / "model_index.json", unet=[None, None]), "component unet is missing"),
    "unknown component": (lambda f: edit(f / "model_index.json", extra=["diffusers", "X"]), "component extra"),
    "odd component": (lambda f: edit(f / "model_index.json", vae=["diffusers"]), "vae must be"),
    "no vae": (lambda f: shutil.rmtree(f / "vae"), "vae: folder is missing"),
    "no unet config": (lambda f: (f / "unet" / "config.json").unlink(), "config.json is missing"),
    "no scheduler": (
        lambda f: (f / "scheduler" / "scheduler_config.json").unlink(),
        "scheduler_config.json is missing",
    ),
    "no merges": (no_merges, "has no merges"),
    "no merges file": (bare_vocabulary, "merges.txt is missing"),
    "text width": (lambda f: edit(f / "unet" / "config.json", cross_attention_dim=24), "cross_attention_dim 24"),
    "latent channels": (lambda f: edit(f / "vae" / "config.json", latent_channels=8), "latent_channels 8"),
    "channels": (lambda f: edit(f / "unet" / "config.json", out_channels=8), "out_channels 8 is not in_channels 4"),
    "tokens": (lambda f: edit(f / "text_encoder" / "config.json", vocab_size=50), "vocab_size is 50"),
    "length": (
        lambda f: edit(f / "tokenizer" / "tokenizer_config.json", model_max_length=77),
        "model_max_length=77; give a whole number from 1 to 16",
    ),
    **{
        f"{file} {key} {value!r}": (
            lambda f, file=file, key=key, value=value: edit(f / file, **{key: value}),
            f"{key}{shown}",
        )
        for file, key, value, shown in [
            ("tokenizer/tokenizer_config.json", "model_max_length", "x", "='x'; give a whole number from 1 to 16"),
            ("tokenizer/tokenizer_config.json", "model_max_length", 1.5, "=1.5; give a whole number from 1 to 16"),
            ("tokenizer/tokenizer_config.json", "model_max_length", -1, "=-1; give a whole number from 1 to 16"),
            ("tokenizer/tokenizer_config.json", "pad_token", None, " is no token"),
            ("text_encoder/config.json", "num_attention_heads", 0, "=0; give a whole number from 1"),
            ("text_encoder/config.json", "intermediate_size", -1, "=-1; give a whole number from 1"),
            ("text_encoder/config.json", "num_hidden_layers", 10**9, "=1000000000; give a whole number from 1 to 256"),
            ("vae/config.json", "norm_num_groups", 0, "=0; give a whole number from 1"),
            ("vae/config.json", "block_out_channels", [], " is empty"),
            ("vae/config.json", "layers_per_block", 10**6, "=1000000; give a whole number from 1 to 256"),
            ("unet/config.json", "layers_per_block", 10**6, " = 1000000; give a whole number from 1 to 256"),
            ("unet/config.json", "transformer_layers_per_block", 10**6, " = 1000000; give an integer from 0 to 256"),
            ("unet/config.json", "block_out_channels", [], " = (); give positive integers"),
            ("unet/config.json", "attention_head_dim", 10**30, f" = {10**30}; give a whole number from 1"),
            ("scheduler/scheduler_config.json", "_class_name", [], " = []; give text"),
            ("model_index.json", "_class_name", {}, " = {}; give text"),
        ]
    },
    "weights of another network": (
        lambda f: edit(f / "unet" / "config.json", layers_per_block=2),
        "tensor down_blocks.0.attentions.1.norm.bias is missing",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folder_is_one_line(name: str, tiny_sd: Path, tmp_path: Path):
    damage, words = BAD[name]
    folder = tmp_path / "folder"
    shutil.copytree(tiny_sd, folder)
    damage(folder)
    with pytest.raises(UserError) as error:
        Pipeline.load(folder)
    assert words in str(error.value)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_folder(tmp_path: Path):
    with pytest.raises(UserError, match="no such folder"):
        Pipeline.load(tmp_path / "nothing")


def test_extra_components_are_skipped(tiny_sd: Path, tmp_path: Path):
    folder = tmp_path / "folder"
    shutil.copytree(tiny_sd, folder)
    edit(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],
    )
    assert Pipeline.load(folder).latent_shape == (8, 8, 4)


def test_interrupted_write_is_not_a_pipeline(loaded: Pipeline, tmp_path: Path):
    save(loaded, tmp_path)
    broken = dataclasses.replace(
        loaded, params={**loaded.params, "vae": {"encoder": {"conv_in": {"bias": np.array([1e9])}}}}
    )
    with pytest.raises(UserError, match=r"encoder\.conv_in\.bias overflows in float16"):
        save(broken, tmp_path, np.float16)
    with pytest.raises(UserError, match=r"model_index\.json is missing"):
        Pipeline.load(tmp_path)


def test_unwritable_folder(loaded: Pipeline, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save(loaded, tmp_path / "file" / "folder")


def test_tokenizing_in_many_threads_at_once():
    """A tokenizer keeps the padding of the call under way in itself: unguarded, some of these come back unpadded."""
    tokenizer = Pipeline.load(WEIGHTS / "pipeline").tokenizer
    prompts = ["a seven", "", "a bold red seven slanted to the right on navy and white stripes"]
    expected = [tokenizers.tokenize(tokenizer, [prompt]) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        for prompt, ids in zip(
            prompts * 200, pool.map(lambda p: tokenizers.tokenize(tokenizer, [p]), prompts * 200), strict=True
        ):
            np.testing.assert_array_equal(ids, expected[prompts.index(prompt)])


def test_words_that_a_small_tokenizer_has_never_seen():
    tokenizer = Pipeline.load(WEIGHTS / "pipeline", without=("text_encoder", "unet", "vae")).tokenizer
    assert {"seven", "bold", "slanted"} <= set(words.known_words(tokenizer))
    with pytest.warns(UserWarning, match="never seen: orange, cow$"):
        tokenizers.warn_of(tokenizer, ["a bold Orange seven", "a thin cow, 3", "a orange 5"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizers.warn_of(tokenizer, ["", "a bold seven slanted to the right", "digit 3, thin strokes"])


def test_a_tokenizer_that_spells_has_no_list_of_words(tiny_sd):
    tokenizer = Pipeline.load(tiny_sd, without=("text_encoder", "unet", "vae")).tokenizer
    assert words.known_words(tokenizer) == ()
    assert words.unknown_words(tokenizer, ["zebra"]) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("special_tokens_map.json", "[]", "expected a JSON object"),
        ("merges.txt", "#version: 0.2\nz z\n", "transformers cannot read this tokenizer"),
        ("merges.txt", "#version: 0.2\n", "has no merges"),
        ("vocab.json", "{", "cannot be read"),
    ],
)
def test_damaged_tokenizers_are_one_line(name, content, message, tiny_vocabulary, tmp_path: Path):
    for file, good in tokenizers.tokenizer_files(*tiny_vocabulary, 16).items():
        (tmp_path / file).write_bytes(good)
    tokenizers.load_tokenizer(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        tokenizers.load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_long_captions_are_counted_in_one_line(tiny_vocabulary, tmp_path: Path):
    for file, good in tokenizers.tokenizer_files(*tiny_vocabulary, 16).items():
        (tmp_path / file).write_bytes(good)
    tokenizer = tokenizers.load_tokenizer(tmp_path)
    long = "the " * 14 + "dog"
    with pytest.warns(UserWarning, match="^2 of 4 prompts are longer than 16 tokens, cut off 'dog': 'the") as told:
        tokenizers.warn_of(tokenizer, ["cat", long, long, "dog"])
    assert len(told) == 1
    with pytest.warns(UserWarning, match=r"^prompt longer than 16 tokens, cut off 'the") as told:
        tokenizers.warn_of(tokenizer, ["the " * 1000])
    assert len(str(told[0].message)) < 300


@pytest.mark.parametrize(
    "prompt", ["a (red:1.3) cat", "cat <lora:more-detail:0.8>", "<hypernet:a:1> cat", "((a, b:.5))"]
)
def test_marks_of_other_programs_are_said_to_be_words(prompt, tiny_vocabulary, tmp_path: Path):
    for file, good in tokenizers.tokenizer_files(*tiny_vocabulary, 77).items():
        (tmp_path / file).write_bytes(good)
    tokenizer = tokenizers.load_tokenizer(tmp_path)
    with pytest.warns(UserWarning, match=re.escape(f"are words here: {prompt!r}; --lora=FILE")):
        tokenizers.warn_of(tokenizer, ["cat", prompt])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizers.warn_of(tokenizer, ["a train (at 12:30)", "1 < 2 (a: b)", "[cat]"])


def _stub(class_name: str = pipelines.SD, scheduler: dict | None = None, cond: int | None = None) -> SimpleNamespace:
    unet = SimpleNamespace(config=SimpleNamespace(time_cond_proj_dim=cond))
    config = {"_class_name": "DDIMScheduler", "beta_schedule": "linear", **(scheduler or {})}
    index = {"_class_name": class_name}
    return SimpleNamespace(folder=Path("sd"), index=index, unet=unet, scheduler=config, classes=None)


@pytest.mark.parametrize(
    ("stub", "message"),
    [
        (_stub("RectifiedFlowPipeline"), "draw with system=instaflow"),
        (_stub(cond=256), "time_cond_proj_dim.*system=lcm"),
        (_stub(scheduler={"_class_name": "LCMScheduler"}), "LCMScheduler, of models that were distilled to few steps"),
        (_stub(scheduler={"_class_name": "TCDScheduler"}), "TCDScheduler, of .*name DDIMScheduler in its scheduler"),
        (_stub(scheduler={"_d2g_timestep": 999}), "a one-step student, no teacher"),
    ],
)
def test_what_is_no_teacher_is_refused_before_it_is_solved(stub, message):
    with pytest.raises(UserError, match=message):
        Solution().schedule(stub)


@pytest.mark.parametrize(
    ("solution", "scheduler"),
    [
        (Solution(steps=7), {"timestep_spacing": "linspace"}),
        (Solution(spacing="linspace"), {}),
        (Solution(spacing="linspace"), {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}),
    ],
)
def test_ddim_with_linspace_is_warned_of(solution, scheduler):
    with pytest.warns(UserWarning, match="sd.*ddim with linspace spacing"):
        solution.schedule(_stub(scheduler=scheduler))


def test_only_ddim_with_linspace_is_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Solution(spacing="trailing").schedule(_stub())
        Solution(solver="euler", spacing="linspace").schedule(_stub())
