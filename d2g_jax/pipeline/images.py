"""Teachers of images: a UNet that is told a class or nothing, a scheduler, and neither VAE nor text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d2g_jax.diffusion.karras import TIME_SCALES
from d2g_jax.models import pixels
from d2g_jax.models.image_unet_config import ImageUNetConfig
from d2g_jax.models.network import Network, Params
from d2g_jax.pipeline.tokenizers import json_bytes, read_component
from d2g_jax.pipeline.weights import save_state_dict, to_state_dict
from d2g_jax.runtime.atomic import write_bytes
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


def save_images_pipeline(
    folder: Path, config: ImageUNetConfig, params: Params, scheduler: Mapping[str, Any], dtype: Any = np.float32
) -> None:
    """Writes a folder that `Pipeline.load` reads, and that diffusers does unless its UNet is EDM's SongUNet.

    `model_index.json` comes last: a folder without it was not finished. Raises `UserError` as `save_state_dict` does.
    """
    fields, kind = config.to_json(), scheduler["_class_name"]
    library = "d2g_jax" if config.song else "diffusers"
    name = EDM if kind in TIME_SCALES else DDIM
    index = {"_class_name": name, "unet": [library, fields["_class_name"]], "scheduler": ["diffusers", kind]}
    try:
        write_bytes(folder / "unet" / "config.json", json_bytes(fields))
        write_bytes(folder / "scheduler" / "scheduler_config.json", json_bytes(dict(scheduler)))
        save_state_dict(to_state_dict(params), folder / "unet" / "diffusion_pytorch_model.safetensors", dtype)
        write_bytes(folder / "model_index.json", json_bytes(index))
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; give a writable place") from error
