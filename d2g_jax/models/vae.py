"""AutoencoderKL by config: the encoder and decoder between images and the latents of SD 1.x, 2.x and SDXL.

The network is that of diffusers' `AutoencoderKL` (Rombach et al., "High-Resolution Image Synthesis with Latent
Diffusion Models", 2022): all group norms have eps 1e-6, the mid blocks have one single-head attention.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from d2g_jax.inputs.fields import as_json, check_sizes, read_fields
from d2g_jax.models.layers import (
    Conv,
    Downsample2D,
    GroupNorm,
    ResnetBlock2D,
    Upsample2D,
)
from d2g_jax.models.network import Network
from d2g_jax.models.pixels import PixelConfig
from d2g_jax.models.transformer import ImageAttention
from d2g_jax.runtime.errors import UserError

_EPS = 1e-6
_BELOW_RIGHT = ((0, 1), (0, 1))
_LOGVAR_RANGE = (-30.0, 20.0)
_OVERLAP = 0.25
"""The part of a tile's side that lies on its neighbour."""
_NEUTRAL = {"act_fn": ("silu",), "latents_mean": (None,), "latents_std": (None,)}


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """diffusers' `AutoencoderKL` configuration.

    `force_upcast` says that half precision overflows in this VAE (SDXL's): run it in float32 or bfloat16.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @property
    def downscale(self) -> int:
        """Image pixels per latent pixel along one side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_json(cls, config: Mapping[str, Any], *, source: str) -> VaeConfig:
        """From a `config.json`; raises `UserError` that names `source` and the key for what is not implemented."""
        unset = [key for key, value in config.items() if value is None]  # of newer versions of diffusers
        known = read_fields(cls, config, source, _NEUTRAL, ignored=unset)
        check_sizes({name: value for name, value in known.items() if not name.endswith("_factor")}, source)
        result = cls(**known)
        levels = len(result.block_out_channels)
        for key, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            if getattr(result, key) != (block,) * levels:
                raise UserError(f"{source}: {key} must be {levels} times {block}, one for each of block_out_channels")
        groups = result.norm_num_groups
        if any(width % groups for width in result.block_out_channels):
            raise UserError(f"{source}: block_out_channels must be multiples of norm_num_groups {groups}")
        return result

    def to_json(self) -> dict[str, Any]:
        """The `config.json` that diffusers loads."""
        return {"_class_name": "AutoencoderKL", "act_fn": "silu", **as_json(self)}


def scale_latents(config: VaeConfig, latents: jax.Array) -> jax.Array:
    """The VAE's own latents -> the latents that the UNet sees and that files hold."""
    return (latents - (config.shift_factor or 0.0)) * config.scaling_factor


def unscale_latents(config: VaeConfig, latents: jax.Array) -> jax.Array:
    """The inverse of `scale_latents`; what `decode` takes."""
    return latents / config.scaling_factor + (config.shift_factor or 0.0)


def _resnet(config: VaeConfig, inputs: int, outputs: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> ResnetBlock2D:
    return ResnetBlock2D(inputs, outputs, groups=config.norm_num_groups, eps=_EPS, dtype=dtype, rngs=rngs)


class MidBlock(nnx.Module):
    """resnet, attention with a single head, resnet at the lowest resolution."""

    def __init__(self, config: VaeConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        channels = config.block_out_channels[-1]
        resnet = lambda: _resnet(config, channels, channels, dtype, rngs)  # noqa: E731
        self.with_attention = config.mid_block_add_attention
        if self.with_attention:
            norm = {"groups": config.norm_num_groups, "eps": _EPS}
            self.attentions = nnx.List([ImageAttention(channels, **norm, head_dim=channels, dtype=dtype, rngs=rngs)])
        self.resnets = nnx.List([resnet(), resnet()])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.resnets[0](x)
        if self.with_attention:
            x = self.attentions[0](x)
        return self.resnets[1](x)


class DownBlock(nnx.Module):
    """Resnets, then a strided convolution unless it is the last level."""

    def __init__(self, config: VaeConfig, level: int, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        widths = config.block_out_channels
        inputs = [widths[max(level - 1, 0)]] + [widths[level]] * (config.layers_per_block - 1)
        self.resnets = nnx.List([_resnet(config, width, widths[level], dtype, rngs) for width in inputs])
        self.last = level == len(widths) - 1
        if not self.last:
            # SD's autoencoder pads below and to the right only
            self.downsamplers = nnx.List([Downsample2D(widths[level], padding=_BELOW_RIGHT, dtype=dtype, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.last else self.downsamplers[0](x)


class UpBlock(nnx.Module):
    """One resnet more than on the way down, then nearest-neighbour upsampling unless it is the last level."""

    def __init__(self, config: VaeConfig, level: int, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        widths = config.block_out_channels[::-1]
        inputs = [widths[max(level - 1, 0)]] + [widths[level]] * config.layers_per_block
        self.resnets = nnx.List([_resnet(config, width, widths[level], dtype, rngs) for width in inputs])
        self.last = level == len(widths) - 1
        if not self.last:
            self.upsamplers = nnx.List([Upsample2D(widths[level], dtype=dtype, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.last else self.upsamplers[0](x)


class Encoder(nnx.Module):
    """Images to the mean and log-variance of latents, as 2 x latent_channels."""

    def __init__(self, config: VaeConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        widths = config.block_out_channels
        self.conv_in = Conv(config.in_channels, widths[0], dtype=dtype, rngs=rngs)
        self.down_blocks = nnx.List([DownBlock(config, i, dtype, rngs=rngs) for i in range(len(widths))])
        self.mid_block = MidBlock(config, dtype, rngs=rngs)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], _EPS, dtype=dtype)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Decoder(nnx.Module):
    """Latents to images."""

    def __init__(self, config: VaeConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        widths = config.block_out_channels
        self.conv_in = Conv(config.latent_channels, widths[-1], dtype=dtype, rngs=rngs)
        self.mid_block = MidBlock(config, dtype, rngs=rngs)
        self.up_blocks = nnx.List([UpBlock(config, i, dtype, rngs=rngs) for i in range(len(widths))])
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], _EPS, dtype=dtype)
        self.conv_out = Conv(widths[0], config.out_channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """`encode` and `decode`; neither knows of `scaling_factor` (see `scale_latents`)."""

    def __init__(self, config: VaeConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        channels = config.latent_channels
        self.use_quant_conv, self.use_post_quant_conv = config.use_quant_conv, config.use_post_quant_conv
        self.encoder = Encoder(config, dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype, rngs=rngs)
        if self.use_quant_conv:
            self.quant_conv = Conv(2 * channels, 2 * channels, 1, padding=0, dtype=dtype, rngs=rngs)
        if self.use_post_quant_conv:
            self.post_quant_conv = Conv(channels, channels, 1, padding=0, dtype=dtype, rngs=rngs)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """images (B, H, W, 3) in [-1, 1] -> mean and log-variance, each (B, h, w, C), unscaled."""
        moments = self.encoder(images)
        if self.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, *_LOGVAR_RANGE)

    def decode(self, latents: jax.Array) -> jax.Array:
        """unscaled latents (B, h, w, C) -> images (B, H, W, 3), about [-1, 1] and not clipped."""
        if self.use_post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)


@functools.cache
def build(config: VaeConfig, dtype: jnp.dtype = jnp.float32) -> Network:
    """The autoencoder as a `Network`; use `method="encode"` or `method="decode"`."""
    return Network.build(config, lambda rngs: AutoencoderKL(config, dtype, rngs=rngs))


def native_side(config: VaeConfig | PixelConfig) -> int:
    """Image pixels along the side that it was trained at; of two different ones the height."""
    return config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]


def decode_tiled(
    config: VaeConfig | PixelConfig, decode: Callable[[np.ndarray], jax.Array], latents: jax.Array
) -> np.ndarray:
    """Decodes large images in overlapping tiles, so that the device holds the activations of one tile only.

    Tiles, overlap and blending are those of diffusers' `AutoencoderKL.enable_tiling()`: each tile, of the VAE's native
    size, is decoded by itself and faded in over what the tiles above and to the left of it show. Latents that fit into
    one tile are decoded whole.

    Args:
      config: of the VAE that `decode` runs.
      decode: unscaled latents (B, h, w, C) -> images (B, H, W, 3), jitted; compiled for up to four shapes of tiles.
      latents: unscaled, (B, h, w, C).

    Returns:
      float32 (B, H, W, 3) on the host, about [-1, 1] and not clipped.

    Raises:
      UserError: for a native size that leaves no step from one tile to the next.
    """
    tile = native_side(config) // config.downscale
    step = int(tile * (1 - _OVERLAP))
    if step < 1:
        raise UserError(f"sample_size={config.sample_size} of the VAE: its tiles are too small; draw without tiles")
    latents = np.asarray(latents)
    height, width = latents.shape[1:3]
    if height <= tile and width <= tile:
        return np.asarray(decode(latents), np.float32)
    blended, shown = (tile - step) * config.downscale, step * config.downscale  # image pixels
    rows, above = [], []
    for top in range(0, height, step):
        row: list[np.ndarray] = []
        for column, left in enumerate(range(0, width, step)):
            image = np.array(decode(latents[:, top : top + tile, left : left + tile]), np.float32)
            if above:
                _fade_in(image, above[column], blended, axis=1)
            if row:
                _fade_in(image, row[-1], blended, axis=2)
            row.append(image)
        rows.append(np.concatenate([image[:, :shown, :shown] for image in row], axis=2))
        above = row
    return np.concatenate(rows, axis=1)


def _fade_in(image: np.ndarray, before: np.ndarray, extent: int, axis: int) -> None:
    """Changes the first `extent` rows or columns of `image` linearly from the last ones of `before` to its own."""
    extent = min(extent, image.shape[axis], before.shape[axis])
    weights = np.arange(extent, dtype=np.float32) / max(extent, 1)
    weights = weights.reshape((-1, 1, 1) if axis == 1 else (-1, 1))
    start = before.shape[axis] - extent
    old = before[:, start:] if axis == 1 else before[:, :, start:]
    new = image[:, :extent] if axis == 1 else image[:, :, :extent]
    new *= weights
    new += old * (1 - weights)
