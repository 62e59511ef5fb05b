"""What stands in a VAE's place where images are the latents: it decodes by doing nothing."""

from __future__ import annotations

import dataclasses
import functools

import jax
from flax import nnx

from d2g_jax.models.network import Keys, Network


@dataclasses.dataclass(frozen=True)
class PixelConfig:
    """What is asked of a VAE's config, for images (B, H, W, `latent_channels`) in [-1, 1]."""

    latent_channels: int
    sample_size: int | tuple[int, int]
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    downscale: int = 1


class Pixels(nnx.Module):
    """No parameters."""

    def __init__(self, config: PixelConfig, rngs: Keys):
        self.config = config

    def decode(self, latents: jax.Array) -> jax.Array:
        return latents


@functools.cache
def build(config: PixelConfig) -> Network:
    return Network.build(config, lambda rngs: Pixels(config, rngs))
