"""`d2g teacher`: the embedded miniature Stable Diffusion, trained from nothing on scikit-learn's digits.

Stages, each skipped when its files are there: autoencoder, text tower and denoiser (together, with caption dropout for
guidance), latent metric, pixel metric, independent classifier. The result is a diffusers folder beside the metrics'
and the classifier's weights; what ships as package data was made by this command.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from d2g_jax.diffusion.schedule import Schedule, add_noise, training_target
from d2g_jax.digits import captions, classifier, data, tokenizer
from d2g_jax.lpips_training.fit import Loss
from d2g_jax.models import clip, unet, vae
from d2g_jax.models.network import Params
from d2g_jax.pipeline import folder as pipelines
from d2g_jax.pipeline import weights
from d2g_jax.runtime.atomic import write_text
from d2g_jax.teacher import metric, pixel_metric
from d2g_jax.teacher.fit import fit, sampled_rows

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
    sample_size=data.SIZE,
    scaling_factor=1.0,  # measured after training
)

UNET = unet.UNetConfig(
    sample_size=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(32, 64),
    layers_per_block=1,
    attention_head_dim=4,  # diffusers' name for the number of heads
    cross_attention_dim=64,
    norm_num_groups=8,
)


def text_config(vocab_size: int, max_length: int = tokenizer.MODEL_MAX_LENGTH) -> clip.ClipTextConfig:
    return clip.ClipTextConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=max_length,
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


def train_autoencoder(config: ml_collections.ConfigDict, images: np.ndarray) -> Params:
    """An AutoencoderKL on images (N, 32, 32, 3): squared error plus a light KL term."""
    network = vae.build(VAE)

    def loss(params: Params, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        mean, logvar = network.apply(params, batch["images"], method="encode")
        latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        error = jnp.mean(jnp.square(network.apply(params, latents, method="decode") - batch["images"]))
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
        return error + config.kl_weight * kl

    return fit(
        loss,
        network.init(jax.random.key(config.seed)),
        lambda step: {"images": images[sampled_rows(len(images), config.batch_size, config.seed, step)]},
        steps=config.steps,
        learning_rate=config.learning_rate,
        seed=config.seed,
        label="autoencoder",
    )


def encode(
    params: Params,
    images: np.ndarray,
    config: vae.VaeConfig = VAE,
    to_floats: Callable[[np.ndarray], np.ndarray] = lambda images: images,
) -> tuple[Latents, float]:
    """Scaled moments of images (N, H, W, 3), and the scaling factor 1 / standard deviation that scaled them.

    `to_floats` makes of some of the images what the autoencoder takes.
    """
    network = vae.build(config)
    moments = jax.jit(lambda batch: network.apply(params, batch, method="encode"))
    parts = [jax.device_get(moments(to_floats(images[i : i + 128]))) for i in range(0, len(images), 128)]
    mean, logvar = (np.concatenate(part) for part in zip(*parts, strict=True))
    std = np.exp(0.5 * logvar)
    scale = round(float(1.0 / np.sqrt(np.var(mean) + np.mean(np.square(std)))), 5)
    return Latents(mean * scale, std * scale), scale


def caption_table(tokens: Any, train: data.Digits, variants: int, seed: int) -> np.ndarray:
    """Token ids (N, variants, L): true captions of every training image, each in its own words."""
    measured = data.attributes(train.images, train.labels)
    rng = np.random.default_rng(seed)
    rounds = [captions.random_captions(rng, train.labels, measured) for _ in range(variants)]
    ids = [pipelines.tokenize(tokens, texts) for texts in rounds]
    return np.stack(ids, axis=1)


class Denoising(NamedTuple):
    """What `fit` takes: loss, first parameters {"text_encoder": ..., "unet": ...}, and the batch of a step."""

    loss: Loss
    params: Params
    batch_at: Callable[[int], dict[str, np.ndarray]]


def denoising(
    config: ml_collections.ConfigDict,
    latents: Latents,
    ids: np.ndarray,
    empty: np.ndarray,
    text: clip.ClipTextConfig,
    unet_config: unet.UNetConfig,
) -> Denoising:
    """The text tower and the UNet together, v-prediction, 10% of captions replaced by the empty one.

    Args:
      latents: scaled moments of the N training images.
      ids: (N, variants, L) captions; empty: (L,) the empty caption.
    """
    tower, network = clip.build(text), unet.build(unet_config)
    schedule = Schedule.from_config(SCHEDULER)

    def loss(params: Params, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        posterior_key, noise_key, time_key = jax.random.split(key, 3)
        x0 = batch["mean"] + batch["std"] * jax.random.normal(posterior_key, batch["mean"].shape)
        drawn = jax.random.normal(noise_key, x0.shape)
        # Stratified over the batch: the same uniform distribution with less variance.
        offset = (jnp.arange(len(x0)) + jax.random.uniform(time_key, (len(x0),))) / len(x0)
        timesteps = (offset * schedule.num_train_timesteps).astype(jnp.int32)
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

    key = jax.random.key(config.seed)
    params = {"text_encoder": tower.init(key), "unet": network.init(jax.random.fold_in(key, 1))}
    return Denoising(loss, params, batch_at)


def train_denoiser(
    config: ml_collections.ConfigDict, latents: Latents, ids: np.ndarray, empty: np.ndarray, text: clip.ClipTextConfig
) -> Params:
    """`denoising` by the digits' recipe. Returns the parameters' moving average over the run."""
    parts = denoising(config, latents, ids, empty, text, UNET)
    return fit(
        *parts,
        steps=config.steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        seed=config.seed,
        label="denoiser",
        ema=config.ema,
    )


def train_pipeline(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Writes `workdir`/pipeline, a complete diffusers folder; finished stages of an earlier try are taken over."""
    folder = workdir / "pipeline"
    if (folder / "model_index.json").exists():
        return
    train, _ = data.load()
    vae_params = stage(
        workdir, "autoencoder", vae.build(VAE).abstract(), lambda: train_autoencoder(config.autoencoder, train.images)
    )
    latents, scale = encode(vae_params, train.images)

    tokenizer.write_tokenizer(folder / "tokenizer")
    tokens = pipelines.load_tokenizer(folder / "tokenizer")
    text = text_config(len(tokens))
    ids = caption_table(tokens, train, config.denoiser.caption_variants, config.denoiser.seed)
    empty = pipelines.tokenize(tokens, [""])[0]
    denoiser = stage(
        workdir,
        "denoiser",
        {"text_encoder": clip.build(text).abstract(), "unet": unet.build(UNET).abstract()},
        lambda: train_denoiser(config.denoiser, latents, ids, empty, text),
    )
    pipelines.save_pipeline(
        folder,
        {
            "text_encoder": text,
            "unet": UNET,
            "vae": dataclasses.replace(VAE, scaling_factor=scale),
            "scheduler": SCHEDULER,
        },
        {**denoiser, "vae": vae_params},
        {"tokenizer": pipelines.read_tokenizer_files(folder / "tokenizer")},
    )


def make_teacher(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Everything that ships as package data: pipeline/, metric/, lpips/, classifier.safetensors, prompts.txt."""
    train_pipeline(config, workdir)
    pipeline = pipelines.Pipeline.load(workdir / "pipeline")
    params, scale = pipeline.params["vae"], pipeline.scaling_factor
    scores = metric.train_metric(config.metric, workdir / "metric", lambda images: _means(params, images, scale))
    print(f"metric: {scores}", file=sys.stderr)
    scores = pixel_metric.train_pixel_metric(config.pixel_metric, workdir / "lpips")
    print(f"pixel metric: {scores}", file=sys.stderr)
    train, _ = data.load()
    if not (workdir / "classifier.safetensors").exists():
        trained = classifier.train_classifier(train.images, train.labels)
        classifier.save_classifier(trained, workdir / "classifier.safetensors")
    prompts = [p.prompt for p in captions.evaluation_prompts(config.prompts.count, config.prompts.seed)]
    write_text(workdir / "prompts.txt", "\n".join(prompts) + "\n")


def _means(params: Params, images: np.ndarray, scale: float) -> np.ndarray:
    """The posterior's mean of images, scaled by the pipeline's own factor."""
    latents, factor = encode(params, images)
    return latents.mean * (scale / factor)


def stage(workdir: Path, name: str, abstract: Params, train: Callable[[], Params]) -> Params:
    """The parameters in `workdir`/stages/`name`.safetensors, trained and written there first if need be."""
    file = workdir / "stages" / f"{name}.safetensors"
    if not file.exists():
        weights.save_state_dict(weights.to_state_dict(train()), file)
    return weights.to_params(weights.load_state_dict(file), abstract, source=str(file))
