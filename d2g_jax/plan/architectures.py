"""Teachers and metrics as shapes alone: what a plan needs of them, without their weights and without a download."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from d2g_jax.config.configuration import compute_dtype
from d2g_jax.digits.config import WEIGHTS
from d2g_jax.inputs import places
from d2g_jax.inputs.text import read_json
from d2g_jax.losses import perceptual
from d2g_jax.losses.lpips import LPIPS, DecodedLPIPS
from d2g_jax.losses.perceptual import LatentLPIPS
from d2g_jax.models import clip, denoisers, vae, vgg
from d2g_jax.models.image_unet_config import ImageUNetConfig
from d2g_jax.pipeline import images
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.pipeline.hub import NETWORKS
from d2g_jax.pipeline.single_file import as_folder, kind_settings
from d2g_jax.runtime.errors import UserError
from d2g_jax.train.setup import DECODED, PERCEPTUAL, Metric

KNOWN: dict[str, tuple[str, dict[str, Any]]] = read_json(Path(__file__).with_name("known.json"), "install it again")
"""Hub ids whose shapes are known here: the kind of single file that is like them, and what differs in its configs.

BK-SDM (arXiv 2305.15798) has one resnet and transformer for two in every block; "small" lacks the middle block, "tiny"
the lowest level too."""

_LEVELS = ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
_UP_LEVELS = ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
DDPM_CIFAR = ImageUNetConfig(
    sample_size=32, block_out_channels=(128, 256, 256, 256), attention_head_dim=None, downsample_padding=0,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"), flip_sin_to_cos=False,
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), freq_shift=1, norm_eps=1e-6,
)  # fmt: skip
DDPMPP_CIFAR = ImageUNetConfig(
    sample_size=32, block_out_channels=(256, 256, 256), stem_channels=128, layers_per_block=4, attention_head_dim=None,
    down_block_types=_LEVELS, up_block_types=_UP_LEVELS, downsample_type="resnet", upsample_type="resnet", song=True,
    flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6, num_class_embeds=10, augment_dim=9,
)  # fmt: skip
_LINEAR = {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}

IMAGES: dict[str, tuple[ImageUNetConfig, dict[str, Any]]] = {
    "google/ddpm-cifar10-32": (DDPM_CIFAR, _LINEAR),
    "teachers/edm-cifar10-32x32-cond-vp": (DDPMPP_CIFAR, {"_class_name": "EDMEulerScheduler"}),
}
"""Teachers of images: the hub id, and the folder that `d2g teacher convert` writes in configs/cifar10_edm.py."""

MODELS = {
    "digits": str(WEIGHTS / "pipeline"),
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
"""Short names of what is measured and planned mostly."""


def abstract_pipeline(model: str) -> Pipeline:
    """A local folder in diffusers' layout, or one of `KNOWN`, with `jax.ShapeDtypeStruct`s in place of its weights.

    Raises `UserError` for any other name, and for a folder that `Pipeline.load` refuses.
    """
    if places.is_there(folder := places.expanded(model)):
        pipeline = Pipeline.load(folder, without=NETWORKS)
    elif model in KNOWN:
        kind, changes = KNOWN[model]
        pipeline = dataclasses.replace(of_kind(kind, json.dumps(changes)), folder=Path(model))
    elif model in IMAGES:
        (config, scheduler), index = IMAGES[model], {"_class_name": images.DDIM}
        network = denoisers.build(config)
        pipeline = Pipeline(Path(model), index, network, images.decoder(config), {}, scheduler)
    else:
        raise UserError(
            f"pipeline={model!r}: neither a local folder nor a model whose shapes are known; download it, or take one "
            f"of {', '.join((*KNOWN, *IMAGES))}"
        )
    params = {name: network.abstract() for name, network in pipeline.networks.items()}
    return dataclasses.replace(pipeline, params=params)


def computing_in(pipeline: Pipeline, dtype: Any) -> Pipeline:
    """The same pipeline with networks that compute in `dtype`; what its parameters are stored in stays."""
    return dataclasses.replace(
        pipeline,
        **{name: clip.build(tower.config, dtype) for name, tower in pipeline.towers.items()},
        unet=denoisers.build(pipeline.unet.config, dtype),
        vae=vae.build(pipeline.vae.config, dtype) if pipeline.classes is None else pipeline.vae,
    )


@functools.cache
def of_kind(kind: str, changes: str = "{}") -> Pipeline:
    """A pipeline without weights of a kind that is shipped for single files; `changes` of its configs are JSON."""
    settings = kind_settings(kind)
    changed = {name: settings[name] | fields for name, fields in json.loads(changes).items()}
    with as_folder(settings | changed) as folder:
        return Pipeline.load(folder, without=NETWORKS)


def abstract_metric(config: ml_collections.ConfigDict, pipeline: Pipeline) -> Metric | None:
    """The metric of a loss config as shapes: by the `config.json` of its folder, else SD's, full size; or None.

    Pixel LPIPS is full size always.
    """
    dtype = compute_dtype("loss.dtype", config.dtype)
    if config.name in DECODED:
        network = vgg.build(vgg.PIXELS, dtype)
        heads = tuple(jax.ShapeDtypeStruct((width,), jnp.float32) for width in vgg.PIXELS.widths)
        lpips = LPIPS(network, network.abstract(), heads)
        return DecodedLPIPS(lpips, pipeline.params["vae"], pipeline.vae, config.get("size", 0))
    if config.name not in PERCEPTUAL:
        return None
    file = Path(config.metric or ".") / "config.json"
    known = vgg.VGGConfig(), perceptual.latent_space("sd15")  # SDXL's has the same shapes
    return LatentLPIPS.abstract(*(perceptual.read_metric_config(file) if file.is_file() else known), dtype)
