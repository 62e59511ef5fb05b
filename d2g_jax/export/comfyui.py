"""A ComfyUI workflow that draws with a student as `d2g sample` does: one network call at its timestep, no guidance.

In ComfyUI's API format, which its page loads by drag and drop and its server takes as a prompt, of nodes of its core.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from d2g_jax.diffusion.schedule import Schedule
from d2g_jax.pipeline.folder import Pipeline

PROMPT = "a photograph of a cat"
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
    last, alpha = timestep == schedule.num_train_timesteps - 1, float(known[timestep])
    height, width, _ = pipeline.latent_shape
    height, width = (side * pipeline.vae.config.downscale for side in (height, width))
    nodes = _loaders(pipeline, file, whole)
    model, clip = ["checkpoint" if whole else "unet", 0], ["checkpoint", 1] if whole else ["clip", 0]
    sampling = {"sampling": _SAMPLING[schedule.prediction_type], "zsnr": zero_snr}
    nodes |= {
        "sampling": _node("ModelSamplingDiscrete", model=model, **sampling),
        "positive": _text(pipeline, clip, PROMPT, height, width),
        "negative": _text(pipeline, clip, "", height, width),
        "empty": _node("EmptyLatentImage", width=width, height=height, batch_size=1),
        "sampler": _node("KSamplerSelect", sampler_name="euler"),
        "sigmas": _node("BasicScheduler", model=["sampling", 0], scheduler="simple", steps=1, denoise=1.0),
    }
    sigmas, latent = ["sigmas", 0], ["empty", 0]
    if not last:
        sigma = math.sqrt((1.0 - alpha) / alpha)
        nodes |= {
            "first": _node("SetFirstSigma", sigmas=sigmas, sigma=sigma),
            "scale": _node("SetFirstSigma", sigmas=sigmas, sigma=math.sqrt(1.0 + sigma**2)),
            "noise": _node("RandomNoise", noise_seed=0),
            "noisy": _node(
                "AddNoise", model=["sampling", 0], noise=["noise", 0], sigmas=["scale", 0], latent_image=latent
            ),
        }
        sigmas, latent = ["first", 0], ["noisy", 0]
    nodes["draw"] = _node(
        "SamplerCustom",
        model=["sampling", 0],
        add_noise=last,
        noise_seed=0,
        cfg=1.0,
        positive=["positive", 0],
        negative=["negative", 0],
        sampler=["sampler", 0],
        sigmas=sigmas,
        latent_image=latent,
    )
    nodes["decode"] = _node("VAEDecode", samples=["draw", 0], vae=["checkpoint", 2] if whole else ["vae", 0])
    nodes["save"] = _node("SaveImage", images=["decode", 0], filename_prefix=file.removesuffix(".safetensors"))
    # ids are numbers for pages that sort by them
    numbers = {name: str(number) for number, name in enumerate(nodes, 1)}
    return {numbers[name]: _renamed(node, numbers) for name, node in nodes.items()}


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}


def _renamed(node: dict[str, Any], numbers: dict[str, str]) -> dict[str, Any]:
    """A node whose links, [node, output], say numbers."""
    inputs = {
        key: [numbers[value[0]], value[1]] if isinstance(value, list) else value
        for key, value in node["inputs"].items()
    }
    return {**node, "inputs": inputs}


def _loaders(pipeline: Pipeline, file: str, whole: bool) -> dict[str, Any]:
    if whole:
        return {"checkpoint": _node("CheckpointLoaderSimple", ckpt_name=file)}
    if pipeline.text_encoder_2 is not None:
        names = {"clip_name1": "clip_l.safetensors", "clip_name2": "clip_g.safetensors"}
        clip = _node("DualCLIPLoader", **names, type="sdxl")
    else:
        sd2 = pipeline.text_encoder.config.hidden_act == "gelu"
        name = "clip_h.safetensors" if sd2 else "clip_l.safetensors"
        clip = _node("CLIPLoader", clip_name=name, type="stable_diffusion")
    unet = _node("UNETLoader", unet_name=file, weight_dtype="default")
    return {"unet": unet, "clip": clip, "vae": _node("VAELoader", vae_name="vae.safetensors")}


def _text(pipeline: Pipeline, clip: list[Any], prompt: str, height: int, width: int) -> dict[str, Any]:
    """A prompt; SDXL's with its sizes."""
    if pipeline.text_encoder_2 is None:
        return _node("CLIPTextEncode", clip=clip, text=prompt)
    sizes = {"width": width, "height": height, "crop_w": 0, "crop_h": 0, "target_width": width}
    return _node("CLIPTextEncodeSDXL", clip=clip, text_g=prompt, text_l=prompt, target_height=height, **sizes)
