"""The embedded world's teacher, trained from nothing: an autoencoder, then text tower and UNet together.

Stages are kept in the workdir and go on where they stopped. The UNet is small on purpose: it attends at its lowest
level alone, so that what it draws in fifty calls, a texture that agrees with itself over the whole picture, one cannot.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from d2g_jax.digits import tokenizer
from d2g_jax.digits.world import captions, scenes
from d2g_jax.digits.world import judge as judges
from d2g_jax.lpips_training import fit as training
from d2g_jax.models import clip, unet, vae
from d2g_jax.models.network import Params
from d2g_jax.pipeline import folder as pipelines
from d2g_jax.pipeline import weights
from d2g_jax.runtime.atomic import write_text
from d2g_jax.teacher import teacher
from d2g_jax.teacher.fit import long_recipe, sampled_rows
from d2g_jax.teacher.judge import accuracy, train_judge
from d2g_jax.teacher.teacher import SCHEDULER, denoising, encode, stage
from d2g_jax.teacher.world_metric import train_metric

# Trained on crops, and so without attention.
VAE = dataclasses.replace(teacher.VAE, sample_size=scenes.SIZE, mid_block_add_attention=False)

UNET = dataclasses.replace(
    teacher.UNET,
    sample_size=scenes.SIZE // VAE.downscale,
    down_block_types=("DownBlock2D",) * 3,
    up_block_types=("UpBlock2D",) * 3,
    block_out_channels=(32, 64, 96),
)

MODEL_MAX_LENGTH = 20
"""Tokens of a caption, its two ends included."""

CROP = 32
"""Pixels: the autoencoder has no need of whole scenes."""


def train_autoencoder(config: ml_collections.ConfigDict, images: np.ndarray, folder: Path) -> Params:
    """An AutoencoderKL on crops of scenes (N, 64, 64, 3) uint8: squared and absolute error, and a light KL term."""
    network = vae.build(VAE)

    def loss(params: Params, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        mean, logvar = network.apply(params, batch["images"], method="encode")
        latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        error = network.apply(params, latents, method="decode") - batch["images"]
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
        return jnp.mean(jnp.square(error)) + config.l1_weight * jnp.mean(jnp.abs(error)) + config.kl_weight * kl

    def batch_at(step: int) -> dict[str, np.ndarray]:
        rows = sampled_rows(len(images), config.batch_size, config.seed, step)
        top, left = np.random.default_rng([config.seed + 1, step]).integers(scenes.SIZE - CROP + 1, size=2)
        return {"images": scenes.to_floats(images[rows, top : top + CROP, left : left + CROP])}

    start = network.init(jax.random.key(config.seed))
    return training.fit(loss, start, batch_at, long_recipe(config, folder), label="autoencoder")


def caption_table(tokens: Any, labels: np.ndarray, variants: int, seed: int) -> np.ndarray:
    """Token ids (N, variants, L): true captions of every scene, each in its own words."""
    rng = np.random.default_rng(seed)
    shown = [scenes.Scene(*map(int, row)) for row in labels]
    rounds = [[captions.random_caption(rng, scene) for scene in shown] for _ in range(variants)]
    return np.stack([pipelines.tokenize(tokens, texts) for texts in rounds], axis=1)


def make_world(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """All that ships as package data: pipeline/, metric/, judge.safetensors, prompts.txt."""
    shown = scenes.render(config.scenes.count, config.scenes.seed)
    train_pipeline(config, shown, workdir)
    pipeline = pipelines.Pipeline.load(workdir / "pipeline", without=("text_encoder", "unet"))
    scale, network = pipeline.scaling_factor, vae.build(VAE)
    means = jax.jit(lambda images: scale * network.apply(pipeline.params["vae"], images, method="encode")[0])
    scores = train_metric(config.metric, shown, workdir, lambda images: np.asarray(means(images)))
    print(f"metric: {scores}", file=sys.stderr)
    judge = stage(
        workdir,
        "judge",
        judges.build().abstract(),
        lambda: train_judge(config.judge, shown, workdir / "training" / "judge"),
    )
    weights.save_state_dict(weights.to_state_dict(judge), workdir / "judge.safetensors", np.float16)
    held_out = scenes.render(2000, config.scenes.seed + 1, test=True)
    print(f"judge, on digits held out: {accuracy(judge, held_out)}", file=sys.stderr)
    prompts = [p.prompt for p in captions.evaluation_prompts(config.prompts.count, config.prompts.seed)]
    write_text(workdir / "prompts.txt", "\n".join(prompts) + "\n")


def train_pipeline(config: ml_collections.ConfigDict, shown: scenes.Scenes, workdir: Path) -> None:
    """Writes `workdir`/pipeline, a complete diffusers folder; finished stages of an earlier try are taken over."""
    target = workdir / "pipeline"
    if (target / "model_index.json").exists():
        return
    vae_params = stage(
        workdir,
        "autoencoder",
        vae.build(VAE).abstract(),
        lambda: train_autoencoder(config.autoencoder, shown.images, workdir / "training" / "autoencoder"),
    )
    latents, scale = encode(vae_params, shown.images, VAE, scenes.to_floats)
    tokenizer.write_tokenizer(target / "tokenizer", captions.words(), MODEL_MAX_LENGTH)
    tokens = pipelines.load_tokenizer(target / "tokenizer")
    text = teacher.text_config(len(tokens), MODEL_MAX_LENGTH)
    ids = caption_table(tokens, shown.labels, config.denoiser.caption_variants, config.denoiser.seed)
    empty = pipelines.tokenize(tokens, [""])[0]
    denoiser = stage(
        workdir,
        "denoiser",
        {"text_encoder": clip.build(text).abstract(), "unet": unet.build(UNET).abstract()},
        lambda: training.fit(
            *denoising(config.denoiser, latents, ids, empty, text, UNET),
            long_recipe(config.denoiser, workdir / "training" / "denoiser"),
            label="denoiser",
            ema=config.denoiser.ema,
        ),
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
        {"tokenizer": pipelines.read_tokenizer_files(target / "tokenizer")},
    )
