"""diffusers' own pipeline class around the modules of one of our pipelines: what `d2g bench pairs` compares with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from d2g_jax.bench import torch_pipeline
from d2g_jax.pipeline.draw import Solution
from d2g_jax.pipeline.folder import SDXL, Pipeline


def solver(
    pipeline: Pipeline, solution: Solution, prompts: list[str], drawn: np.ndarray, dtype: str, *, compiles: bool
) -> Callable[[], np.ndarray]:
    """A function that solves DDIM for `prompts` from the noise `drawn` (B, C, h, w) and waits for float32 latents.

    Weights, tokenizers and schedule are the pipeline's. `compiles`: torch.compile of the UNet, on GPUs with
    max-autotune; as in diffusers' guide, which leaves the towers alone: they run once, the UNet in every step.
    """
    import torch

    theirs = _assemble(pipeline, dtype)
    if compiles:
        theirs.unet = torch_pipeline.compiler()(theirs.unet)
    latents = torch.from_numpy(drawn.copy()).to(torch_pipeline.device(), getattr(torch, dtype))

    def call() -> np.ndarray:
        with torch.inference_mode():
            result = theirs(
                prompts,
                num_inference_steps=solution.steps,
                guidance_scale=solution.guidance_scale,
                latents=latents,
                output_type="latent",
            ).images
            return result.float().cpu().numpy()  # waits for the device

    return call


def _assemble(pipeline: Pipeline, dtype: str) -> Any:
    import diffusers

    parts = torch_pipeline.modules(pipeline, dtype)
    # Schedules that do not speak of clipping are not clipped by us, but by diffusers' default.
    parts["scheduler"] = diffusers.DDIMScheduler.from_config({"clip_sample": False, **pipeline.scheduler})
    parts["tokenizer"] = pipeline.tokenizer
    if pipeline.index["_class_name"] == SDXL:
        theirs = diffusers.StableDiffusionXLPipeline(
            **parts,
            tokenizer_2=pipeline.tokenizer_2,
            force_zeros_for_empty_prompt=pipeline.zeros_for_empty_prompt,
            add_watermarker=False,
        )
    else:
        theirs = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    theirs.set_progress_bar_config(disable=True)
    return theirs
