"""The quirks of real Stable Diffusion folders, one fixture each, made of the miniature ones that diffusers writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from d2g_jax.diffusion import solvers
from d2g_jax.diffusion.schedule import Schedule
from d2g_jax.pipeline import weights
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.pipeline.tokenizers import load_tokenizer, tokenize
from d2g_jax.runtime.errors import UserError

VAE, TEXT = "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"
PREFIX = "text_model."


@pytest.fixture
def sd(tiny_sd: Path, tmp_path: Path) -> Path:
    """A Stable Diffusion folder to edit."""
    return Path(shutil.copytree(tiny_sd, tmp_path / "sd"))


@pytest.fixture
def sdxl(tiny_sdxl: Path, tmp_path: Path) -> Path:
    """An SDXL folder to edit."""
    return Path(shutil.copytree(tiny_sdxl, tmp_path / "sdxl"))


@pytest.fixture(scope="module")
def plain(tiny_sd: Path) -> Pipeline:
    """The Stable Diffusion folder as diffusers writes it today."""
    return Pipeline.load(tiny_sd)


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def rewrite(file: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    """Replaces the tensors of a file by what `change` makes of them."""
    state = {key: np.array(value) for key, value in load_file(file).items()}
    file.unlink()
    save_file({key: np.ascontiguousarray(value) for key, value in change(state).items()}, file)


def equal(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def equals_torch(params, model) -> bool:
    """Whether a tree holds exactly the parameters of a torch model."""
    theirs = {key: value.detach().float().numpy() for key, value in model.named_parameters()}
    ours = weights.to_state_dict(params)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[key], theirs[key]) for key in ours)


# ---------------------------------------------------------------------------------------------------------------------
# scheduler


PNDM = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None, "clip_sample": False,
}  # fmt: skip


def test_pndm_scheduler_gives_its_schedule_only(sd: Path):
    """SD 1.x names a solver that we do not have: what we take of it is what diffusers' DDIM takes of the same file."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    (sd / "scheduler" / "scheduler_config.json").write_text(json.dumps(PNDM))
    edit(sd / "model_index.json", scheduler=["diffusers", "PNDMScheduler"])
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(sd).scheduler
    assert type(theirs).__name__ == "PNDMScheduler"
    ddim = diffusers.DDIMScheduler.from_config(theirs.config)
    ddim.set_timesteps(20)
    schedule = Schedule.from_config(Pipeline.load(sd).scheduler)
    assert (schedule.set_alpha_to_one, schedule.steps_offset) == (False, 1)
    np.testing.assert_allclose(schedule.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-5)
    np.testing.assert_array_equal(solvers.timesteps("ddim", schedule, 20), ddim.timesteps)
    noise = np.random.default_rng(0).normal(size=(1, 4, 4, 4)).astype(np.float32)
    ours = solvers.ddim(lambda x, t: 0.1 * x, schedule, 20, jnp.asarray(noise))
    latents = torch.tensor(noise)
    for t in ddim.timesteps:
        latents = ddim.step(0.1 * latents, t, latents).prev_sample
    assert relative(ours, latents.numpy()) <= 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# components that are not read


def test_folders_that_drawing_does_not_need_are_not_opened(sd: Path, plain: Pipeline):
    extras = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    }
    edit(sd / "model_index.json", **extras)
    for name in extras:
        (sd / name).mkdir()
        (sd / name / "config.json").write_text("not JSON")
        (sd / name / "pytorch_model.bin").write_bytes(b"never read")
    (sd / "v1-5-pruned.ckpt").write_bytes(b"never read")
    assert equal(Pipeline.load(sd).params, plain.params)


# ---------------------------------------------------------------------------------------------------------------------
# names and files of weights


RENAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def with_old_names(state: dict[str, np.ndarray], axes: int) -> dict[str, np.ndarray]:
    old = {}
    for key, value in state.items():
        if ".attentions." in key:
            for new_name, old_name in RENAMES.items():
                key = key.replace(new_name, old_name)
            value = value.reshape(value.shape + (1,) * (axes - 2)) if value.ndim == 2 else value
        old[key] = value
    return old


@pytest.mark.parametrize("axes", [2, 4])
def test_old_vae_attention(axes: int, sd: Path, plain: Pipeline):
    """The VAEs of 2022 call it query, key, value, proj_attn; some still hold CompVis' 1x1 convolutions."""
    diffusers = pytest.importorskip("diffusers")
    assert len([key for key in load_file(sd / VAE) if ".to_q.weight" in key]) == 2
    rewrite(sd / VAE, lambda state: with_old_names(state, axes))
    assert not any(".to_q." in key for key in load_file(sd / VAE))
    loaded = Pipeline.load(sd).params["vae"]
    assert equal(loaded, plain.params["vae"])
    if axes == 2:  # diffusers itself reads only these
        assert equals_torch(loaded, diffusers.AutoencoderKL.from_pretrained(sd / "vae"))


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_clip_keys_with_and_without_prefix(prefix: str, sd: Path, plain: Pipeline):
    """transformers before and after version 5, with the buffer that versions before 4.31 stored."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")

    def rename(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        renamed = {prefix + key.removeprefix(PREFIX): value for key, value in state.items()}
        return renamed | {f"{prefix}embeddings.position_ids": np.arange(16)[None]}

    rewrite(sd / TEXT, rename)
    loaded = Pipeline.load(sd)
    assert equal(loaded.params, plain.params)
    ids = tokenize(loaded.tokenizer, ["the cat", "dog"])
    ours = jax.jit(loaded.text_encoder.apply)(loaded.params["text_encoder"], ids).last_hidden_state
    with torch.no_grad():
        theirs = transformers.CLIPTextModel.from_pretrained(sd / "text_encoder")(torch.tensor(ids)).last_hidden_state
    assert relative(ours, theirs) <= 1e-5


@pytest.mark.parametrize("eos_token_id", [2, None])
def test_end_of_text(eos_token_id: int | None, sdxl: Path):
    """OpenAI's and OpenCLIP's configs say 2: pooling happens at the largest id, elsewhere at the first end token."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    ids = tokenize(load_tokenizer(sdxl / "tokenizer_2"), ["the cat", "dog"])
    if eos_token_id is None:
        eos_token_id = 5  # no longer the largest id: the two rules differ
        ids = np.where(ids == ids.max(), eos_token_id, ids)
        ids[:, 1] = ids.max() + 1
    edit(sdxl / "text_encoder_2" / "config.json", eos_token_id=eos_token_id)
    loaded = Pipeline.load(sdxl)
    ours = jax.jit(loaded.text_encoder_2.apply)(loaded.params["text_encoder_2"], ids)
    model = transformers.CLIPTextModelWithProjection.from_pretrained(sdxl / "text_encoder_2")
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).text_embeds
    assert loaded.text_encoder_2.config.eos_token_id == eos_token_id
    assert relative(ours.text_embeds, theirs) <= 1e-5


@pytest.mark.parametrize(("variant", "dtype"), [("fp16", jnp.float16), ("bf16", jnp.bfloat16)])
def test_only_one_variant(variant: str, dtype, sd: Path, plain: Pipeline):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(sd)
    for model in (theirs.text_encoder, theirs.unet, theirs.vae):
        model.to(getattr(torch, jnp.dtype(dtype).name))
    shutil.rmtree(sd)
    theirs.save_pretrained(sd, variant=variant)
    assert {file.name for file in sd.rglob("*.safetensors")} == {
        f"model.{variant}.safetensors", f"diffusion_pytorch_model.{variant}.safetensors"
    }  # fmt: skip
    loaded = Pipeline.load(sd)
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), plain.params)
    assert equal(loaded.params, rounded)
    assert equals_torch(loaded.params["unet"], theirs.unet)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_unet(variant: str | None, sd: Path):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel.from_pretrained(sd / "unet")
    shutil.rmtree(sd / "unet")
    model = model if variant is None else model.to(torch.float16)
    model.save_pretrained(sd / "unet", max_shard_size="200KB", variant=variant)
    assert len(list((sd / "unet").glob("*-of-*.safetensors"))) > 2
    assert len(list((sd / "unet").glob("*.index*.json"))) == 1
    assert equals_torch(Pipeline.load(sd).params["unet"], model)


def old_tokenizer(folder: Path, pad_token: str) -> None:
    """As transformers 4 wrote it before there was a tokenizer.json."""
    tokens = json.loads((folder / "tokenizer.json").read_text())["model"]
    for file in folder.iterdir():
        file.unlink()
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokens["merges"]]
    token = lambda content: {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}  # noqa: E731, E501  # fmt: skip
    special = {
        "bos_token": token("<|startoftext|>"), "eos_token": token("<|endoftext|>"), "pad_token": pad_token,
        "unk_token": token("<|endoftext|>"),
    }  # fmt: skip
    typed = {key: {"__type": "AddedToken", **value} for key, value in special.items() if isinstance(value, dict)}
    config = {
        "add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 16,
        "name_or_path": "openai/clip-vit-large-patch14", "special_tokens_map_file": "./special_tokens_map.json",
        "tokenizer_class": "CLIPTokenizer", **typed, "pad_token": pad_token,
    }  # fmt: skip
    (folder / "vocab.json").write_text(json.dumps(tokens["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "q"])
def test_old_tokenizer_and_its_padding(pad_token: str, sd: Path, plain: Pipeline):
    """SD 2.x and SDXL's second tokenizer pad with "!" (here "q") and not with the end of the text."""
    old_tokenizer(sd / "tokenizer", pad_token)
    prompts = ["the Cat", "dog x", "", "a"]
    ids = tokenize(load_tokenizer(sd / "tokenizer"), prompts)
    end = plain.tokenizer.eos_token_id
    expected = tokenize(plain.tokenizer, prompts)
    for row in expected:
        row[np.argmax(row == end) + 1 :] = plain.tokenizer.convert_tokens_to_ids(pad_token)
    np.testing.assert_array_equal(ids, expected)


# ---------------------------------------------------------------------------------------------------------------------
# what overflows in half precision


def test_upcast_attention(sd: Path):
    """SD 2.1's UNet in float16, with attention logits that float16 cannot hold, against torch in float32."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    edit(sd / "unet" / "config.json", upcast_attention=True)

    def enlarge(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        scale = {key: 3000.0 if key.endswith(("attn2.to_q.weight", "attn2.to_k.weight")) else 1.0 for key in state}
        return {key: value * np.float32(scale[key]) for key, value in state.items()}

    rewrite(sd / UNET, enlarge)
    rng = np.random.default_rng(0)
    latents, text = rng.normal(size=(1, 8, 8, 4)).astype(np.float32), rng.normal(size=(1, 5, 16)).astype(np.float32)
    model = diffusers.UNet2DConditionModel.from_pretrained(sd / "unet")
    with torch.no_grad():
        theirs = model(torch.tensor(latents.transpose(0, 3, 1, 2)), 500, torch.tensor(text)).sample
    loaded = Pipeline.load(sd, dtype=jnp.float16)
    assert loaded.unet.config.upcast_attention
    ours = jax.jit(loaded.unet.apply)(loaded.params["unet"], latents, np.full(1, 500), text)
    assert relative(ours, theirs.numpy().transpose(0, 2, 3, 1)) <= 0.05


def decoded(pipeline: Pipeline, latents: np.ndarray) -> Callable[[], jax.Array]:
    return lambda: pipeline.vae.apply(pipeline.params["vae"], latents, method="decode")


@pytest.mark.parametrize(
    ("dtype", "force_upcast", "expected"),
    [
        (jnp.float16, True, jnp.float32),
        (jnp.float16, False, jnp.float16),
        (jnp.bfloat16, True, jnp.bfloat16),
        (jnp.float32, True, jnp.float32),
    ],
)
def test_force_upcast_is_for_float16(dtype, force_upcast: bool, expected, sdxl: Path):
    edit(sdxl / "vae" / "config.json", force_upcast=force_upcast)
    loaded = Pipeline.load(sdxl, dtype=dtype)
    latents = np.zeros((1, 8, 8, 4), np.float32)
    assert jax.eval_shape(decoded(loaded, latents)).dtype == expected
    text = jax.eval_shape(lambda: loaded.text_encoder.apply(loaded.params["text_encoder"], np.zeros((1, 16), np.int32)))
    assert text.last_hidden_state.dtype == dtype


def test_sdxl_vae_that_overflows_float16(sdxl: Path):
    """SDXL's VAE has activations that float16 cannot hold; here they are in the millions."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    rewrite(
        sdxl / VAE,
        lambda state: {k: v * np.float32(1e6 if k == "decoder.conv_in.weight" else 1) for k, v in state.items()},
    )
    latents = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)
    ours = jax.jit(decoded(Pipeline.load(sdxl, dtype=jnp.float16), latents))()
    with torch.no_grad():
        model = diffusers.AutoencoderKL.from_pretrained(sdxl / "vae")
        theirs = model.decode(torch.tensor(latents.transpose(0, 3, 1, 2))).sample
    assert relative(ours, theirs.numpy().transpose(0, 2, 3, 1)) <= 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line that names the file and the key


def truncate(folder: Path, kept: int) -> None:
    content = (folder / TEXT).read_bytes()
    (folder / TEXT).write_bytes(content[:kept])


def pointer(folder: Path) -> None:
    """What `git clone` leaves without git-lfs."""
    (folder / TEXT).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 492265168\n")


def pickle_only(folder: Path) -> None:
    (folder / TEXT).rename(folder / "text_encoder" / "pytorch_model.bin")


def tensor(folder: Path, change: Callable[[dict[str, np.ndarray], str], object]) -> None:
    """Applies `change` to the tensors and the key of the final norm's bias."""

    def changed(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        change(state, next(key for key in state if key.endswith("final_layer_norm.bias")))
        return state

    rewrite(folder / TEXT, changed)


def no_merges(folder: Path) -> None:
    old_tokenizer(folder / "tokenizer", "<|endoftext|>")
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")


BAD = {
    "truncated": (lambda f: truncate(f, -1), (TEXT, "not a whole safetensors file", "fetch it again")),
    "empty": (lambda f: truncate(f, 0), (TEXT, "not a whole safetensors file")),
    "git-lfs pointer": (pointer, (TEXT, "a Git LFS pointer")),
    "pickle only": (pickle_only, ("text_encoder/pytorch_model.bin", "pickle files are refused", "safetensors")),
    "no weights": (lambda f: (f / TEXT).unlink(), ("text_encoder: holds no weights", "model.safetensors")),
    "NaN": (lambda f: tensor(f, lambda s, k: s[k].fill(np.nan)), (TEXT, "final_layer_norm.bias holds NaN")),
    "missing tensor": (
        lambda f: tensor(f, lambda s, k: s.pop(k)),
        ("text_encoder: tensor text_model.final_layer_norm.bias is missing", "config.json"),
    ),
    "extra tensor": (
        lambda f: tensor(f, lambda s, k: s.update(visual=s[k])),
        (TEXT, "unexpected tensor visual", "config.json"),
    ),
    "wrong shape": (
        lambda f: tensor(f, lambda s, k: s.update({k: s[k][:3]})),
        (TEXT, "final_layer_norm.bias has shape (3,)", "needs (16,)"),
    ),
    "merges.txt without merges": (no_merges, ("tokenizer", "has no merges", "merges.txt")),
    "other text tower": (
        lambda f: edit(f / "model_index.json", text_encoder=["transformers", "T5EncoderModel"]),
        ("model_index.json", "text_encoder", "T5EncoderModel", "CLIPTextModel"),
    ),
    "missing shard": (
        lambda f: (f / TEXT).rename(f / "text_encoder" / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
        ),
        ("text_encoder/model-00001-of-00002.safetensors", "model.safetensors.index.json"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_folder_is_one_line(name: str, sd: Path):
    damage, words = BAD[name]
    damage(sd)
    with pytest.raises(UserError) as error:
        Pipeline.load(sd)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(str(sd))
    for word in words:
        assert word in message
