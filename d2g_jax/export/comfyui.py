"""A ComfyUI workflow that draws with a student as `d2g sample` does: one network call at its timestep, no guidance.

In ComfyUI's API format, which its page loads by drag and drop and its server takes as a prompt, of nodes of its core;
`comfyui.json` has them. SDXL's sizes are those of the latents where a text says none.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from d2g_jax.diffusion.schedule import Schedule
from d2g_jax.inputs.text import read_json
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.pipeline.original_keys import kind_of

_SAMPLING = {"epsilon": "eps", "v_prediction": "v_prediction"}
_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
"""The one schedule that ComfyUI's discrete models have, with and without zero terminal SNR."""


def workflow(pipeline: Pipeline, timestep: int, file: str, *, whole: bool) -> dict[str, Any] | None:
    """The workflow as a JSON object; None for a schedule or a prediction that ComfyUI's core does not have.

    ComfyUI counts noise by sigma = sqrt((1 - a) / a), a = alphas_cumprod[t], and divides the latents by
    sqrt(1 + sigma^2) before the network sees them. At its last timestep it starts with noise of just that deviation, at
    any other with sigma: there the noise is added beforehand, for a student was trained on standard normal noise.

    Args:
      pipeline: the student's.
      timestep: of its one call.
      file: its name in ComfyUI's folder of models.
      whole: a checkpoint with text towers and VAE; else a UNet alone, beside which the teacher's files are loaded.
    """
    schedule = Schedule.from_config(pipeline.scheduler)
    zero_snr = bool(pipeline.scheduler.get("rescale_betas_zero_snr"))
    asked = {"prediction_type": schedule.prediction_type, "rescale_betas_zero_snr": zero_snr}
    known = Schedule.from_config({**_BETAS, **asked}).alphas_cumprod
    same = len(known) == schedule.num_train_timesteps and np.allclose(known, schedule.alphas_cumprod, atol=1e-6)
    if not same or schedule.prediction_type not in _SAMPLING:
        return None
    data = read_json(Path(__file__).with_name("comfyui.json"), "install the package again")
    nodes = {**data["loaders"]["whole" if whole else kind_of(pipeline.networks)], **data["nodes"]}
    last, alpha = timestep == schedule.num_train_timesteps - 1, float(known[timestep])
    height, width, _ = (pipeline.vae.config.downscale * side for side in pipeline.latent_shape)
    clip, vae = (["1", 1], ["1", 2]) if whole else (["2", 0], ["3", 0])
    given: dict[str, dict[str, Any]] = {
        "1": {"ckpt_name" if whole else "unet_name": file},
        "4": {"sampling": _SAMPLING[schedule.prediction_type], "zsnr": zero_snr},
        "5": {"clip": clip},
        "6": {"clip": clip},
        "7": {"width": width, "height": height},
        "11": {"vae": vae},
        "12": {"filename_prefix": file.removesuffix(".safetensors")},
    }
    if not last:
        sigma = math.sqrt((1.0 - alpha) / alpha)
        nodes |= data["noised"]
        given |= {"13": {"sigma": sigma}, "14": {"sigma": math.sqrt(1.0 + sigma**2)}}
        given["10"] = {"add_noise": False, "sigmas": ["13", 0], "latent_image": ["16", 0]}
    return {name: {**node, "inputs": node["inputs"] | given.get(name, {})} for name, node in nodes.items()}
