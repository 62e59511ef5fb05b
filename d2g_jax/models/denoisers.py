"""The UNet of a config.json, whichever of the two kinds it describes: of latents and text, or of images and classes."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp

from d2g_jax.models import image_unet, unet
from d2g_jax.models.image_unet_config import CLASSES, ImageUNetConfig
from d2g_jax.models.network import Network
from d2g_jax.models.unet_config import UNetConfig

UNetLike = UNetConfig | ImageUNetConfig


def read_unet_config(values: dict[str, Any], *, source: str) -> UNetLike:
    """From a parsed `config.json`; `source` is the file's name for messages. Raises `UserError` as the configs do."""
    kind = ImageUNetConfig if values.get("_class_name") in CLASSES else UNetConfig
    return kind.from_json(values, source=source)


def backbone(config: UNetLike) -> type[unet.UNetBackbone]:
    """The class of a config's network without its output layers."""
    return image_unet.ImageBackbone if isinstance(config, ImageUNetConfig) else unet.UNetBackbone


def build(config: UNetLike, dtype: Any = jnp.float32, attention: str = "auto", remat: str = "none") -> Network:
    """The UNet as a `Network`; `remat`, one of `layers.REMATS`, is for its resnets and transformers."""
    return _build(config, dtype, attention, remat)  # the cache would tell a default from the same value given


@functools.cache
def _build(config: UNetLike, dtype: Any, attention: str, remat: str) -> Network:
    kind = image_unet.ImageUNet if isinstance(config, ImageUNetConfig) else unet.UNet2DConditionModel
    kw = {"dtype": dtype, "attention": attention, "remat": remat}
    return Network.build(config, lambda rngs: kind(config, **kw, rngs=rngs))
