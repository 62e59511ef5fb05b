"""`d2g teacher`: the embedded miniature Stable Diffusion, trained from nothing on digits in front of textures.

Trainings, each gone on with where it stopped and taken as it is where it is done: autoencoder, text tower alone,
denoiser and text tower (together, with caption dropout for guidance), latent metric, pixel metric, independent judge.
The result is a diffusers folder beside the metrics' and the judge's weights; what ships as package data was made by
this command.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from d2g_jax.diffusion.schedule import Schedule, add_noise, training_target
from d2g_jax.digits import captions, scenes, tokenizer
from d2g_jax.inputs.images import to_floats
from d2g_jax.lpips_training import fit as training
from d2g_jax.lpips_training.classify import cross_entropy
from d2g_jax.lpips_training.fit import Batch, Loss, sampled_rows
from d2g_jax.models import clip, denoisers, vae
from d2g_jax.models.network import Params
from d2g_jax.pipeline import folder as pipelines
from d2g_jax.pipeline import tokenizers, weights
from d2g_jax.runtime import runs
from d2g_jax.runtime.atomic import write_text
from d2g_jax.runtime.lock import locked
from d2g_jax.teacher.fit import long_recipe
from d2g_jax.teacher.judge import accuracy, train_judge
from d2g_jax.teacher.metric import check_triplets, train_metric
from d2g_jax.teacher.pixel_metric import train_pixel_metric

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": True,
}
"""SD 2.x's schedule. v-prediction keeps the student's conversion to x_0 from multiplying its errors by 14."""

VAE = vae.VaeConfig(
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    block_out_channels=(16, 16, 32),
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=8,
    sample_size=scenes.SIZE,
    mid_block_add_attention=False,
    scaling_factor=1.0,  # measured after training
)

UNET = denoisers.UNetConfig(
    sample_size=scenes.SIZE // VAE.downscale,
    down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    block_out_channels=(32, 64, 96),
    layers_per_block=1,
    attention_head_dim=4,  # diffusers' name for the number of heads
    cross_attention_dim=64,
    norm_num_groups=8,
)
"""It attends at its lowest level alone, so that what it draws in many calls, a texture that agrees with itself over the
whole picture, one cannot: docs/when.md."""


def text_config(vocab_size: int) -> clip.ClipTextConfig:
    return clip.ClipTextConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.MODEL_MAX_LENGTH,
        projection_dim=64,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )


@dataclasses.dataclass(frozen=True)
class Latents:
    """Moments of the training images under the autoencoder, scaled: mean and standard deviation (N, h, w, C)."""

    mean: np.ndarray
    std: np.ndarray


def train_autoencoder(config: ml_collections.ConfigDict, images: np.ndarray, folder: Path) -> Params:
    """An AutoencoderKL on scenes (N, 64, 64, 3) uint8: squared and absolute error, and a light KL term."""
    network = vae.build(VAE)

    def loss(params: Params, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        mean, logvar = network.apply(params, batch["images"], method="encode")
        latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        error = network.apply(params, latents, method="decode") - batch["images"]
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
        return jnp.mean(jnp.square(error)) + config.l1_weight * jnp.mean(jnp.abs(error)) + config.kl_weight * kl

    def batch_at(step: int) -> dict[str, np.ndarray]:
        return {"images": to_floats(images[sampled_rows(len(images), config.batch_size, config.seed, step)])}

    start = network.init(jax.random.key(config.seed))
    return training.fit(loss, start, batch_at, long_recipe(config, folder), label="autoencoder")


def encode(params: Params, images: np.ndarray) -> tuple[Latents, float]:
    """Scaled moments of uint8 images (N, H, W, 3), and the factor 1 / standard deviation that scaled them."""
    network = vae.build(VAE)
    moments = jax.jit(lambda batch: network.apply(params, batch, method="encode"))
    parts = [jax.device_get(moments(to_floats(images[i : i + 128]))) for i in range(0, len(images), 128)]
    mean, logvar = (np.concatenate(part) for part in zip(*parts, strict=True))
    std = np.exp(0.5 * logvar)
    scale = round(float(1.0 / np.sqrt(np.var(mean) + np.mean(np.square(std)))), 5)
    return Latents(mean * scale, std * scale), scale


def caption_table(tokens: Any, labels: np.ndarray, variants: int, seed: int) -> np.ndarray:
    """Token ids (N, variants, L): true captions of every scene, each in its own words."""
    rng = np.random.default_rng(seed)
    shown = [scenes.Scene(*map(int, row)) for row in labels]
    rounds = [[captions.random_caption(rng, scene) for scene in shown] for _ in range(variants)]
    return np.stack([tokenizers.tokenize(tokens, texts) for texts in rounds], axis=1)


def train_text_tower(
    config: ml_collections.ConfigDict, ids: np.ndarray, labels: np.ndarray, text: clip.ClipTextConfig, folder: Path
) -> Params:
    """A text tower that can name the parts of a caption, as CLIP's could before a UNet listened to it.

    Every token from the caption's end on learns to carry all of them. A tower at random says next to nothing, and a
    UNet does not attend to that for thousands of steps.

    Args:
      ids: (N, variants, L) captions; labels: (N, 7) of the scenes.
    """
    tower, parts = clip.build(text), tuple(scenes.PARTS.values())
    key = jax.random.key(config.seed)
    head = nnx.initializers.lecun_normal()(jax.random.fold_in(key, 1), (text.hidden_size, sum(parts)))

    def loss(params: dict[str, Params], batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        hidden = tower.apply(params["tower"], batch["ids"]).last_hidden_state
        ended = (batch["ids"] == text.eos_token_id)[..., None]
        logits = (hidden * ended).sum(1) / ended.sum(1) @ params["head"]
        return cross_entropy(logits, batch["labels"], parts)

    def batch_at(step: int) -> dict[str, np.ndarray]:
        rows = sampled_rows(len(ids), config.batch_size, config.seed, step)
        chosen = np.random.default_rng([config.seed + 1, step]).integers(ids.shape[1], size=len(rows))
        return {"ids": ids[rows, chosen].astype(np.int32), "labels": labels[rows].astype(np.int32)}

    start = {"tower": tower.init(key), "head": head}
    return training.fit(loss, start, batch_at, long_recipe(config, folder), label="text_tower")["tower"]


def denoising(
    config: ml_collections.ConfigDict,
    latents: Latents,
    ids: np.ndarray,
    empty: np.ndarray,
    text: clip.ClipTextConfig,
    text_params: Params,
) -> tuple[Loss, Params, Callable[[int], Batch]]:
    """The text tower and the UNet together, v-prediction, 10% of captions replaced by the empty one: what `fit` takes.

    Loss, first parameters {"text_encoder": ..., "unet": ...}, and the batch of a step.

    Args:
      latents: scaled moments of the N training images.
      ids: (N, variants, L) captions; empty: (L,) the empty caption.
      text_params: of the text tower to begin with.
    """
    tower, network = clip.build(text), denoisers.build(UNET)
    schedule = Schedule.from_config(SCHEDULER)

    def loss(params: Params, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        posterior_key, noise_key, time_key = jax.random.split(key, 3)
        x0 = batch["mean"] + batch["std"] * jax.random.normal(posterior_key, batch["mean"].shape)
        drawn = jax.random.normal(noise_key, x0.shape)
        # Stratified over the batch: the same distribution with less variance. A power below 1 draws more of the noisy
        # end, where captions decide: 256 places show a digit through much noise, and later there is nothing to ask.
        offset = (jnp.arange(len(x0)) + jax.random.uniform(time_key, (len(x0),))) / len(x0)
        timesteps = (offset**config.time_power * schedule.num_train_timesteps).astype(jnp.int32)
        alpha_bar = jnp.asarray(schedule.alphas_cumprod)[timesteps][:, None, None, None]
        hidden = tower.apply(params["text_encoder"], batch["ids"]).last_hidden_state
        output = network.apply(params["unet"], add_noise(x0, drawn, alpha_bar), timesteps, hidden)
        return jnp.mean(jnp.square(output - training_target(schedule.prediction_type, x0, drawn, alpha_bar)))

    def batch_at(step: int) -> dict[str, np.ndarray]:
        rows = sampled_rows(len(ids), config.batch_size, config.seed, step)
        rng = np.random.default_rng([config.seed + 1, step])
        chosen = ids[rows, rng.integers(ids.shape[1], size=len(rows))]
        chosen = np.where(rng.random(len(rows))[:, None] < config.caption_dropout, empty, chosen)
        return {"mean": latents.mean[rows], "std": latents.std[rows], "ids": chosen.astype(np.int32)}

    params = {"text_encoder": text_params, "unet": network.init(jax.random.key(config.seed))}
    return loss, params, batch_at


def make_teacher(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """All that ships as package data: pipeline/, metric/, lpips/, judge.safetensors, prompts.txt.

    Raises `UserError` for a workdir of another config, a live run's, and a number of triplets that is none of chunks.
    """
    check_triplets(config)
    with locked(workdir):
        runs.claim(workdir, ml_collections.ConfigDict({"job": "teacher", "teacher": config}))
        _make(config, workdir)


def _make(config: ml_collections.ConfigDict, workdir: Path) -> None:
    shown = scenes.render(config.scenes.count, config.scenes.seed)
    train_pipeline(config, shown, workdir)
    pipeline = pipelines.Pipeline.load(workdir / "pipeline", without=("text_encoder", "unet"))
    scale, network = pipeline.scaling_factor, vae.build(VAE)
    means = jax.jit(lambda images: scale * network.apply(pipeline.params["vae"], images, method="encode")[0])
    scores = train_metric(config.metric, shown, workdir, lambda images: np.asarray(means(images)))
    print(f"metric: {scores}", file=sys.stderr)
    print(f"pixel metric: {train_pixel_metric(config.pixel_metric, shown, workdir)}", file=sys.stderr)
    judge = train_judge(config.judge, shown, workdir / "training" / "judge")
    weights.save_state_dict(weights.to_state_dict(judge), workdir / "judge.safetensors", np.float16)
    held_out = scenes.render(2000, config.scenes.seed + 1, test=True)
    print(f"judge, on digits held out: {accuracy(judge, held_out)}", file=sys.stderr)
    prompts = [p.prompt for p in captions.evaluation_prompts(config.prompts.count, config.prompts.seed)]
    write_text(workdir / "prompts.txt", "\n".join(prompts) + "\n")


def train_pipeline(config: ml_collections.ConfigDict, shown: scenes.Scenes, workdir: Path) -> None:
    """Writes `workdir`/pipeline, a complete diffusers folder; finished trainings of an earlier try are taken over."""
    target, training_folder = workdir / "pipeline", workdir / "training"
    if (target / "model_index.json").exists():
        return
    plain = scenes.render(config.scenes.plain, config.scenes.seed + 2, plain=True)
    images, labels = (np.concatenate(both) for both in ((shown.images, plain.images), (shown.labels, plain.labels)))
    vae_params = train_autoencoder(config.autoencoder, images, training_folder / "autoencoder")
    latents, scale = encode(vae_params, images)
    tokenizer.write_tokenizer(target / "tokenizer")
    tokens = tokenizers.load_tokenizer(target / "tokenizer")
    text = text_config(len(tokens))
    ids = caption_table(tokens, labels, config.denoiser.caption_variants, config.denoiser.seed)
    empty = tokenizers.tokenize(tokens, [""])[0]
    text_params = train_text_tower(config.text_tower, ids, labels, text, training_folder / "text_tower")
    denoiser = training.fit(
        *denoising(config.denoiser, latents, ids, empty, text, text_params),
        long_recipe(config.denoiser, training_folder / "denoiser"),
        label="denoiser",
        ema=config.denoiser.ema,
    )
    pipelines.save_pipeline(
        target,
        {
            "text_encoder": text,
            "unet": UNET,
            "vae": dataclasses.replace(VAE, scaling_factor=scale),
            "scheduler": SCHEDULER,
        },
        {**denoiser, "vae": vae_params},
        {"tokenizer": tokenizer.tokenizer_files()},
    )
