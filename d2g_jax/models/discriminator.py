"""The conditional multi-scale discriminator D(c, z, x) of Diffusion2GAN: the teacher's UNet with dense heads.

The noise z enters through a zero convolution behind conv_in, the latent x once more at every lower level of the
encoder, and every level of the decoder is read in three places. The paper shows where; how exactly (kernel sizes,
addition, resizing, head shape, timestep) it does not say: those are our choices, each a default that this file states.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from d2g_jax.models import initializers
from d2g_jax.models.denoisers import UNetLike, backbone
from d2g_jax.models.layers import Conv, GroupNorm, remat_call
from d2g_jax.models.network import Keys, Network, Params
from d2g_jax.runtime.errors import UserError

BACKBONE = "unet"
"""First part of the path of every parameter that came from the teacher; all others are new."""


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """What the discriminator is built from.

    Attributes:
      unet: the teacher's UNet, which is the backbone.
      timestep: the constant that the backbone is told as its time; 0 since D sees clean latents (the paper is silent).
      head_channels: width of a head's hidden layer (the paper is silent).
      z_conditioning: D sees the noise that the latent was made from.
      multiscale_inputs: D sees the latent at every level of the encoder.
      multiscale_heads: three logit maps for each level of the decoder; otherwise one, on the last level's output.
    """

    unet: UNetLike
    timestep: float = 0
    head_channels: int = 256
    z_conditioning: bool = True
    multiscale_inputs: bool = True
    multiscale_heads: bool = True


class Head(nnx.Module):
    """GroupNorm, SiLU, 3x3 convolution, SiLU, 1x1 convolution: (B, h, w, C) -> float32 logits (B, h, w).

    The last weights start near zero, so that all logits do: the generator's first gradients are then gentle.
    """

    def __init__(self, channels: int, config: DiscriminatorConfig, *, dtype: Any, rngs: Keys):
        small = initializers.normal(1e-3)
        self.norm = GroupNorm(config.unet.norm_num_groups, channels, config.unet.norm_eps, dtype=dtype)
        self.conv_hidden = Conv(channels, config.head_channels, dtype=dtype, rngs=rngs)
        self.conv_out = Conv(config.head_channels, 1, 1, padding=0, kernel_init=small, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = self.conv_hidden(jax.nn.silu(self.norm(x)))
        return self.conv_out(jax.nn.silu(hidden))[..., 0].astype(jnp.float32)


def resize(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Antialiased bilinear resize of (B, H, W, C) in float32; linear in x, so R1 differentiates through it."""
    shape = (x.shape[0], *size, x.shape[-1])
    return jax.image.resize(x.astype(jnp.float32), shape, "linear", antialias=True)


def tap_channels(config: UNetLike) -> list[tuple[int, int, int]]:
    """Channels of the three taps of each decoder level, from low to high resolution (see `UNetBackbone.decode`)."""
    widths = config.block_out_channels
    skips = (config.stem_channels, *widths[:-1])
    return [(skip, width + skip, width) for skip, width in zip(skips[::-1], widths[::-1], strict=True)]


class Discriminator(nnx.Module):
    """Is this latent the teacher's for this noise and this text? Asked at every location of every head."""

    def __init__(
        self,
        config: DiscriminatorConfig,
        *,
        dtype: Any = jnp.float32,
        attention: str = "auto",
        remat: str = "none",
        with_backbone: bool = True,
        rngs: Keys,
    ):
        channels, widths = config.unet.in_channels, config.unet.block_out_channels
        kw = {"dtype": dtype, "rngs": rngs}

        def zero_conv(width: int) -> Conv:
            return Conv(channels, width, kernel_init=initializers.zeros, **kw)

        self.config, self.remat = config, remat
        if with_backbone:
            self.unet = backbone(config.unet)(config.unet, dtype=dtype, attention=attention, remat=remat, rngs=rngs)
        self.noise_in = nnx.List([zero_conv(config.unet.stem_channels)] if config.z_conditioning else [])
        # Entry i belongs to level i + 1: the full resolution already goes through conv_in
        self.latent_in = nnx.List([zero_conv(width) for width in widths[:-1]] if config.multiscale_inputs else [])
        taps = sum(tap_channels(config.unet), ()) if config.multiscale_heads else (widths[0],)
        self.heads = nnx.List([Head(tap, config, **kw) for tap in taps])

    def __call__(
        self,
        latents: jax.Array,
        noise: jax.Array,
        encoder_hidden_states: jax.Array,
        added: dict[str, jax.Array] | None = None,
        timesteps: jax.Array | None = None,
    ) -> list[jax.Array]:
        """Latents and noise (B, h, w, C), text states (B, L, D) -> float32 logit maps, each (B, h_i, w_i).

        `timesteps` (B,): of latents that were noised; None: the config's for all.

        Positive means real. The maps go from the lowest decoder level to the highest, and within a level: the skip
        tensor of its last resnet, that resnet's whole input, the level's output before upsampling. `added` is SDXL's.
        """
        if timesteps is None:
            timesteps = jnp.full(latents.shape[:1], self.config.timestep)
        temb = self.unet.embed(timesteps, encoder_hidden_states, added)
        additions = self._additions(latents, noise)
        hidden, skips = self.unet.encode(latents, temb, encoder_hidden_states, additions)
        hidden = self.unet.middle(hidden, temb, encoder_hidden_states)
        hidden, taps = self.unet.decode(hidden, skips, temb, encoder_hidden_states)
        features = sum(taps, ()) if self.config.multiscale_heads else (hidden,)
        return [remat_call(self.remat, head, x) for head, x in zip(self.heads, features, strict=True)]

    def _additions(self, latents: jax.Array, noise: jax.Array) -> list[jax.Array | None]:
        """What is added to the hidden state that enters each level of the encoder."""
        levels = len(self.config.unet.block_out_channels)
        additions: list[jax.Array | None] = [None] * levels
        for convolution in self.noise_in:
            additions[0] = convolution(noise)
        height, width = latents.shape[1:3]
        for level, convolution in enumerate(self.latent_in, start=1):
            height, width = -(-height // 2), -(-width // 2)
            additions[level] = convolution(resize(latents, (height, width)))
        return additions


@functools.cache
def build(
    config: DiscriminatorConfig, dtype: Any = jnp.float32, attention: str = "auto", remat: str = "none"
) -> Network:
    """The discriminator as a `Network`. Build a second one with `attention="twice"` for R1's second derivatives."""
    kw = {"dtype": dtype, "attention": attention, "remat": remat}
    return Network.build(config, lambda rngs: Discriminator(config, **kw, rngs=rngs))


def init_from_teacher(network: Network, key: jax.Array, unet_params: Params) -> Params:
    """Parameters with a copy of the teacher's UNet as the backbone and all other layers fresh.

    The teacher's output layers, which the discriminator lacks, are left out. Raises `UserError` when `unet_params` are
    not those of the UNet in `network.config`.
    """
    shapes = network.abstract()[BACKBONE]
    backbone = {name: unet_params[name] for name in shapes if name in unet_params}
    if jax.tree.map(jnp.shape, backbone) != jax.tree.map(jnp.shape, shapes):
        raise UserError("the teacher's parameters do not fit the discriminator's unet config; use the teacher's own")
    fresh = Network.build(network.config, lambda rngs: Discriminator(network.config, with_backbone=False, rngs=rngs))
    return {**fresh.init(key), BACKBONE: jax.tree.map(jnp.copy, backbone)}
