"""The one-step systems of the paper's tables: how each calls its UNet, and what it makes of the answer, as data.

A checkpoint in diffusers' layout does not say with which timestep its UNet is to be called, nor what its output means,
once it has been distilled: its authors' pipelines do. Teachers at any number of steps are `draw.Solution`s.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from d2g_jax.diffusion.schedule import Denoiser, Schedule, one_step
from d2g_jax.models.layers import sinusoidal_embedding
from d2g_jax.runtime.errors import UserError

FLOW = "flow"


@dataclasses.dataclass(frozen=True)
class OneStep:
    """How a one-step generator is called.

    Attributes:
      timestep: that the UNet is told; except with a flow, also where in the schedule the noise is taken to be.
      prediction_type: of the UNet's output: one of `diffusion.PREDICTION_TYPES`, or "flow", the velocity of a rectified
        flow, which goes in one step of length 1 from the noise to the latents; None is the pipeline's own.
      scaled: whether the UNet sees the noise times sqrt(1 - ab), as from the first step of an Euler solver with
        trailing spacing, and not as it was drawn.
      guidance_scale: of the guidance embedding of a latent consistency model, whose UNet has `time_cond_proj_dim`.
    """

    timestep: int
    prediction_type: str | None = None
    scaled: bool = False
    guidance_scale: float | None = None

    def schedule(self, schedule: Schedule) -> Schedule:
        """`schedule` with this prediction type. Raises `UserError` for a timestep that it does not have."""
        if self.prediction_type == FLOW:
            return schedule
        if not 0 <= self.timestep < schedule.num_train_timesteps:
            raise UserError(f"timestep {self.timestep}; the schedule has 0 to {schedule.num_train_timesteps - 1}")
        return dataclasses.replace(schedule, prediction_type=self.prediction_type or schedule.prediction_type)

    def check_unet(self, time_cond_proj_dim: int | None) -> None:
        """Raises `UserError` when this system and a UNet disagree about a guidance embedding."""
        if self.guidance_scale is not None and time_cond_proj_dim is None:
            raise UserError("this UNet has no time_cond_proj_dim, so system=lcm does not fit it")
        if self.guidance_scale is None and time_cond_proj_dim is not None:
            raise UserError("this UNet has a time_cond_proj_dim, as latent consistency models have; give system=lcm")

    def generate(self, denoise: Denoiser, schedule: Schedule, noise: jax.Array) -> jax.Array:
        """Noise (B, h, w, C) as drawn -> float32 scaled latents (B, h, w, C) in one call; pure."""
        if self.prediction_type == FLOW:
            noise = noise.astype(jnp.float32)
            return noise + denoise(noise, jnp.asarray(self.timestep, jnp.int32)).astype(jnp.float32)
        schedule = self.schedule(schedule)
        start = noise * jnp.sqrt(1.0 - schedule.alphas_cumprod[self.timestep]) if self.scaled else noise
        return one_step(denoise, schedule, self.timestep, start)


def guidance_embedding(guidance_scale: float, size: int, batch: int) -> jax.Array:
    """float32 (batch, size): a guidance scale as a latent consistency model's UNet takes it (arXiv 2310.04378).

    Sines, then cosines, of 1000 (guidance_scale - 1), as in diffusers' `get_guidance_scale_embedding`.
    """
    weights = jnp.full((batch,), 1000.0 * (guidance_scale - 1.0))
    return sinusoidal_embedding(weights, size, flip_sin_to_cos=False, freq_shift=1)


SYSTEMS: dict[str, OneStep] = {
    # pipeline_rf.py of gnobitab/InstaFlow: t = 1000 (1 - i / N), latents + v / N
    "instaflow": OneStep(1000, FLOW),
    # SD 1.5 of DMD and DMD2: x_0 at the last timestep
    "dmd": OneStep(999),
    # tianweiy/DMD2's one-step SDXL: LCMScheduler at timesteps=[399], whose boundary terms are below 2e-8 there
    "dmd2-sdxl": OneStep(399),
    # stabilityai/sdxl-turbo: EulerAncestralDiscreteScheduler, trailing, one step (no noise is added in the last one)
    "sdxl-turbo": OneStep(999, scaled=True),
    # ByteDance/SDXL-Lightning, sdxl_lightning_1step_unet_x0: EulerDiscreteScheduler, trailing, prediction_type="sample"
    "sdxl-lightning": OneStep(999, "sample", scaled=True),
    # The same with a UNet that predicts epsilon, as those of two and more steps do
    "sdxl-lightning-epsilon": OneStep(999, "epsilon", scaled=True),
    # LCMScheduler's one step; 8.5 is diffusers' default guidance of LatentConsistencyModelPipeline
    "lcm": OneStep(999, guidance_scale=8.5),
}


def find_system(name: str) -> OneStep:
    """Raises `UserError` for an unknown name."""
    if name not in SYSTEMS:
        raise UserError(f"system={name}: unknown; known are {', '.join(SYSTEMS)}")
    return SYSTEMS[name]
