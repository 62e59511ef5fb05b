"""Teachers and metrics as shapes alone: what a plan needs of them, without their weights and without a download."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import ml_collections

from d2g_jax.config.configuration import compute_dtype
from d2g_jax.digits.config import WEIGHTS
from d2g_jax.inputs.text import read_json
from d2g_jax.losses import perceptual
from d2g_jax.losses.perceptual import LatentLPIPS
from d2g_jax.models import clip, unet, vae, vgg
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.pipeline.hub import NETWORKS
from d2g_jax.pipeline.single_file import as_folder, kind_settings
from d2g_jax.runtime.errors import UserError
from d2g_jax.train.setup import PERCEPTUAL

KNOWN: dict[str, tuple[str, dict[str, Any]]] = read_json(Path(__file__).with_name("known.json"), "install it again")
"""Hub ids whose shapes are known here: the kind of single file that is like them, and what differs in its configs.

BK-SDM (arXiv 2305.15798) has one resnet and transformer for two in every block; "small" lacks the middle block, "tiny"
the lowest level too."""

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
    if Path(model).exists():
        pipeline = Pipeline.load(model, without=NETWORKS)
    elif model in KNOWN:
        kind, changes = KNOWN[model]
        pipeline = dataclasses.replace(of_kind(kind, json.dumps(changes)), folder=Path(model))
    else:
        raise UserError(
            f"pipeline={model!r}: neither a local folder nor a model whose shapes are known; download it, or take one "
            f"of {', '.join(KNOWN)}"
        )
    params = {name: network.abstract() for name, network in pipeline.networks.items()}
    return dataclasses.replace(pipeline, params=params)


def computing_in(pipeline: Pipeline, dtype: Any) -> Pipeline:
    """The same pipeline with networks that compute in `dtype`; what its parameters are stored in stays."""
    return dataclasses.replace(
        pipeline,
        **{name: clip.build(tower.config, dtype) for name, tower in pipeline.towers.items()},
        unet=unet.build(pipeline.unet.config, dtype),
        vae=vae.build(pipeline.vae.config, dtype),
    )


@functools.cache
def of_kind(kind: str, changes: str = "{}") -> Pipeline:
    """A pipeline without weights of a kind that is shipped for single files; `changes` of its configs are JSON."""
    settings = kind_settings(kind)
    changed = {name: settings[name] | fields for name, fields in json.loads(changes).items()}
    with as_folder(settings | changed) as folder:
        return Pipeline.load(folder, without=NETWORKS)


def abstract_metric(config: ml_collections.ConfigDict) -> LatentLPIPS | None:
    """The metric of a loss config as shapes: by the `config.json` of its folder, else SD's, full size; or None."""
    if config.name not in PERCEPTUAL:
        return None
    file, dtype = Path(config.metric or ".") / "config.json", compute_dtype("loss.dtype", config.dtype)
    known = vgg.VGGConfig(), perceptual.latent_space("sd15")  # SDXL's has the same shapes
    return LatentLPIPS.abstract(*(perceptual.read_metric_config(file) if file.is_file() else known), dtype)
