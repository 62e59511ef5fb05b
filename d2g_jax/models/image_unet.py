"""UNets of images, told a class or nothing: diffusers' `UNet2DModel`, which EDM's ADM is too, and EDM's SongUNet.

The blocks are those of `unet.py`; what is in them differs, and stands here. SongUNet's parts have the names that the
same parts have in diffusers.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from d2g_jax.models.image_unet_config import ImageUNetConfig
from d2g_jax.models.initializers import normal
from d2g_jax.models.layers import (
    Conv,
    Downsample2D,
    Linear,
    ResnetBlock2D,
    TimestepEmbedding,
    Upsample2D,
    sinusoidal_embedding,
)
from d2g_jax.models.network import Keys
from d2g_jax.models.transformer import ImageAttention
from d2g_jax.models.unet import Factory, UNet2DConditionModel, UNetBackbone

_BELOW_RIGHT = ((0, 1), (0, 1))
"""Padding of a downsampler that has `downsample_padding` 0."""


@functools.lru_cache(maxsize=64)
def _filter(size: int, taps: tuple[int, ...], up: bool, padding: int) -> np.ndarray:
    """One axis of a low-pass filter and halving, (size' / 2, size), or of doubling and the filter, (2 size, size).

    Zeros stand beyond the border; sums of a row are one, away from it.
    """
    count = 2 * size if up else (size + 2 * padding - len(taps)) // 2 + 1
    matrix = np.zeros((count, size), np.float32)
    for i in range(size if up else count):
        for k, tap in enumerate(taps):
            place = 2 * i - padding + k
            if 0 <= place < (count if up else size):
                matrix[(place, i) if up else (i, place)] += (2 if up else 1) * tap / sum(taps)
    return matrix


def resample(x: jax.Array, taps: tuple[int, ...], *, up: bool, padding: int | None = None) -> jax.Array:
    """(B, H, W, C) at twice or half the size through a separable low-pass filter; (1, 1) is nearest and mean of four.

    `padding`, zeros before and after; None is what keeps the sizes even.
    """
    padding = (len(taps) - 1) // 2 if padding is None else padding
    rows, columns = (jnp.asarray(_filter(size, taps, up, padding), x.dtype) for size in x.shape[1:3])
    return jnp.einsum("yi,xj,bijc->byxc", rows, columns, x, precision="highest")


class ImageFactory(Factory):
    """Makes the layers of a UNet of images."""

    def resnet(self, in_channels: int, out_channels: int, scale: float = 1.0, **more: Any) -> ResnetBlock2D:
        config = self.config
        shape = (in_channels, out_channels, config.time_embed_dim)
        more |= {"groups": config.norm_num_groups, "eps": config.norm_eps, **self.kw}
        more |= {"scale_shift": config.resnet_time_scale_shift == "scale_shift"}
        return ResnetBlock2D(*shape, output_scale_factor=scale * config.skip_scale, **more)

    def attention_of(self, level: int, depth: int) -> ImageAttention:
        config = self.config
        channels, middle = config.block_out_channels[level], level < 0
        return ImageAttention(
            channels,
            groups=(middle and config.attn_norm_num_groups) or config.norm_num_groups,
            eps=config.norm_eps,
            head_dim=config.attention_head_dim or channels,
            scale=config.skip_scale * (config.mid_block_scale_factor if middle else 1.0),
            attention=self.attention,
            **self.kw,
        )

    def downsampler(self, channels: int) -> nnx.Module:
        if self.config.resamples[0]:
            return self._resampler(channels, up=False)
        padding = self.config.downsample_padding or _BELOW_RIGHT
        return Downsample2D(channels, padding=padding, **self.kw)

    def upsampler(self, channels: int) -> nnx.Module:
        return self._resampler(channels, up=True) if self.config.resamples[1] else Upsample2D(channels, **self.kw)

    def _resampler(self, channels: int, *, up: bool) -> ResnetBlock2D:
        change = functools.partial(resample, taps=self.config.resample_filter, up=up)
        return self.resnet(channels, channels, resample=change, project=self.config.song)


class ImageBackbone(UNetBackbone):
    """The UNet without its output norm and convolution."""

    FACTORY = ImageFactory
    config: ImageUNetConfig

    def _make_embeddings(self, config: ImageUNetConfig, kw: dict[str, Any]) -> None:
        width, classes = config.wave_channels, config.num_class_embeds
        self.time_embedding = TimestepEmbedding(width, config.time_embed_dim, **kw)
        embedding = augment = None
        if classes is not None:
            embedding = Linear(classes, width, **kw) if config.song else Table(classes, config, kw["rngs"])
        if config.augment_dim is not None:
            augment = Linear(config.augment_dim, width, use_bias=False, **kw)
        self.class_embedding, self.augment_embedding = embedding, augment
        if config.residual_input:
            # the filter behind each convolution takes its zeros from in front of it
            edge = 1 + (len(config.resample_filter) - 1) // 2
            entering = (config.in_channels, *config.block_out_channels[:-2])
            pairs = zip(entering, config.block_out_channels[:-1], strict=True)
            self.input_convs = nnx.List([Conv(a, b, padding=edge, **kw) for a, b in pairs])

    def embed(
        self,
        timesteps: jax.Array,
        condition: jax.Array | None,
        added: None = None,
        timestep_cond: None = None,
    ) -> jax.Array:
        """The embedding (B, 4 C0) of noise levels (B,) as the network was told them, and of classes.

        `condition` float32 (B, K) is one at the class, or all zeros for none; None for a network without classes.
        """
        config = self.config
        flip, shift = config.flip_sin_to_cos, config.freq_shift
        if config.fourier is None:
            wave = sinusoidal_embedding(timesteps, config.stem_channels, flip_sin_to_cos=flip, freq_shift=shift)
        else:
            angles = timesteps.astype(jnp.float32)[:, None] * (2 * math.pi * np.asarray(config.fourier, np.float32))
            wave = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        if self.class_embedding is None:
            return self.time_embedding(wave)
        label = self.class_embedding(condition)
        return self.time_embedding(wave + label) if config.song else self.time_embedding(wave) + label

    def _enter(self, level: int, hidden: jax.Array, entered: jax.Array) -> jax.Array:
        if not self.config.residual_input:
            return hidden
        smaller = resample(self.input_convs[level - 1](entered), self.config.resample_filter, up=False, padding=0)
        return (hidden + smaller) / self.config.skip_scale


class Table(nnx.Module):
    """A row for each class: (B, K) one-hot -> (B, 4 C0)."""

    def __init__(self, classes: int, config: ImageUNetConfig, rngs: Keys):
        self.embedding = nnx.Param(normal(1.0)(rngs.params(), (classes, config.time_embed_dim), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.matmul(x, self.embedding[...].astype(jnp.float32), precision="highest")


class ImageUNet(ImageBackbone, UNet2DConditionModel):
    """Images (B, H, W, C), noise levels (B,) and classes (B, K) or None -> (B, H, W, C_out) in the compute dtype."""
