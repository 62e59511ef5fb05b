"""Teachers of images: a UNet that is told a class or nothing, a scheduler, and neither VAE nor text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d2g_jax.diffusion.karras import TIME_SCALES
from d2g_jax.models import pixels
from d2g_jax.models.image_unet_config import ImageUNetConfig
from d2g_jax.models.network import Network
from d2g_jax.pipeline.tokenizers import read_component
from d2g_jax.runtime.errors import UserError

DDPM, DDIM, EDM = "DDPMPipeline", "DDIMPipeline", "EDMPipeline"
PIPELINES = (DDPM, DDIM, "ConsistencyModelPipeline", EDM)
"""Classes of diffusers, and ours for EDM's levels, which it has no pipeline for."""
COMPONENTS = ("unet", "scheduler")
NO_CLASS = -1
"""The token of a prompt that names none."""


def component(folder: Path, name: str) -> Path:
    """Where a component lies: in a folder of its name, or, as of old, beside model_index.json."""
    return folder / name if (folder / name).is_dir() else folder


def is_of_images(folder: Path) -> bool:
    """Whether a pipeline's folder is one of these."""
    file = folder / "model_index.json"
    return file.is_file() and read_component(file).get("_class_name") in PIPELINES


def all_classes(classes: int) -> tuple[str, ...]:
    """A prompt for each class; the empty one where there are none."""
    return tuple(map(str, range(classes))) or ("",)


def decoder(config: ImageUNetConfig) -> Network:
    """What stands in the VAE's place."""
    return pixels.build(pixels.PixelConfig(config.in_channels, config.sample_size))


def scheduler_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's config for the ODE, which clips no estimate of x_0, whatever DDPM's ancestral sampling does."""
    return {**values, **({"clip_sample": False} if values.get("clip_sample") else {})}


def pipeline_of(scheduler: Mapping[str, Any]) -> str:
    """Of `PIPELINES` the class of a teacher with this scheduler."""
    return EDM if scheduler["_class_name"] in TIME_SCALES else DDIM


def class_ids(classes: int, prompts: Sequence[str], source: object) -> np.ndarray:
    """Prompts as int32 (N, 1): the class that each names, `NO_CLASS` throughout for a teacher of no classes.

    Raises `UserError` for a prompt that names no class of a teacher that has some, and for any prompt of one without.
    """
    ids = []
    for prompt in prompts:
        name = prompt.strip()
        if not classes and name:
            raise UserError(f"prompt {prompt!r}: {source} is told nothing; give empty prompts")
        if classes and not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < classes):
            raise UserError(f"prompt {prompt!r}: {source} is told a class, a number from 0 to {classes - 1}, no text")
        ids.append(int(name) if classes else NO_CLASS)
    return np.asarray(ids, np.int32).reshape(-1, 1)
