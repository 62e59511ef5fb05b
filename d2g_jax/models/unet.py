"""UNet2DConditionModel of Stable Diffusion 1.x, 2.x, XL and their pruned relatives, by config.

Every block is written once; the discriminator builds on `UNetBackbone`, which is the network without its output layers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from d2g_jax.models.layers import (
    Conv,
    Downsample2D,
    GroupNorm,
    ResnetBlock2D,
    TimestepEmbedding,
    Upsample2D,
    remat_call,
    sinusoidal_embedding,
)
from d2g_jax.models.network import Keys
from d2g_jax.models.transformer import Transformer2DModel
from d2g_jax.runtime.errors import UserError


class Factory:
    """Makes the layers of one UNet: what they have in common is said once."""

    def __init__(self, config: Any, dtype: Any, attention: str, remat: str, rngs: Keys):
        self.config, self.attention, self.remat = config, attention, remat
        self.kw = {"dtype": dtype, "rngs": rngs}

    def resnet(self, in_channels: int, out_channels: int, scale: float = 1.0) -> ResnetBlock2D:
        config = self.config
        shape = (in_channels, out_channels, config.time_embed_dim)
        norm = {"groups": config.norm_num_groups, "eps": config.norm_eps}
        return ResnetBlock2D(*shape, **norm, output_scale_factor=scale, **self.kw)

    def attention_of(self, level: int, depth: int) -> nnx.Module:
        config = self.config
        return Transformer2DModel(
            config.block_out_channels[level],
            heads=config.heads[level],
            depth=depth,
            context_dim=config.cross_attention_dim,
            groups=config.norm_num_groups,
            use_linear_projection=config.use_linear_projection,
            upcast=config.upcast_attention,
            attention=self.attention,
            remat=self.remat,
            **self.kw,
        )

    def downsampler(self, channels: int) -> nnx.Module:
        return Downsample2D(channels, padding=self.config.downsample_padding, **self.kw)

    def upsampler(self, channels: int) -> nnx.Module:
        return Upsample2D(channels, **self.kw)


class DownBlock(nnx.Module):
    """One encoder level: resnets, in some levels each followed by attention, and a downsampler but at the last."""

    def __init__(self, make: Factory, level: int):
        config = make.config
        channels = config.block_out_channels[level]
        layers = range(config.layers[level])
        before = config.block_out_channels[level - 1] if level else config.stem_channels
        self.resnets = nnx.List([make.resnet(channels if i else before, channels) for i in layers])
        self.attentions = nnx.List([make.attention_of(level, depth) for depth in config.down_attentions[level]])
        last = level == len(config.block_out_channels) - 1
        self.downsamplers = nnx.List([] if last else [make.downsampler(channels)])
        self.remat = make.remat

    def __call__(self, hidden: jax.Array, temb: jax.Array, context: Any) -> tuple[jax.Array, list[jax.Array]]:
        """Returns the hidden state for the next level and every skip tensor of this one, in order."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            hidden = remat_call(self.remat, resnet, hidden, temb)
            if self.attentions:
                hidden = self.attentions[i](hidden, context)
            skips.append(hidden)
        for downsampler in self.downsamplers:
            hidden = downsampler(hidden, temb)
            skips.append(hidden)
        return hidden, skips


class MidBlock(nnx.Module):
    """At the lowest resolution a resnet, and in most networks attention and a second resnet."""

    def __init__(self, make: Factory):
        config = make.config
        channels, scale = config.block_out_channels[-1], config.mid_block_scale_factor
        self.resnets = nnx.List([make.resnet(channels, channels, scale) for _ in range(config.mid_resnets)])
        self.attentions = nnx.List([make.attention_of(-1, depth) for depth in config.mid_attentions])
        self.remat = make.remat

    def __call__(self, hidden: jax.Array, temb: jax.Array, context: Any) -> jax.Array:
        hidden = remat_call(self.remat, self.resnets[0], hidden, temb)
        for attention in self.attentions:
            hidden = attention(hidden, context)
        for resnet in self.resnets[1:]:
            hidden = remat_call(self.remat, resnet, hidden, temb)
        return hidden


class UpBlock(nnx.Module):
    """One decoder level: one resnet more than the encoder's, each fed with a skip tensor; `upsample` comes apart."""

    def __init__(self, make: Factory, index: int):
        config = make.config
        widths, top = config.block_out_channels, len(config.block_out_channels) - 1
        level = top - index
        channels, after = widths[level], widths[level - 1] if level else config.stem_channels
        count = config.layers[level] + 1
        hidden = [widths[min(level + 1, top)]] + [channels] * (count - 1)
        skip = [channels] * (count - 1) + [after]
        self.resnets = nnx.List([make.resnet(a + b, channels) for a, b in zip(hidden, skip, strict=True)])
        # behind the level's last resnets: all of them, or the last alone
        self.attentions = nnx.List([make.attention_of(level, depth) for depth in config.up_attentions[index]])
        self.upsamplers = nnx.List([make.upsampler(channels)] if level else [])
        self.remat = make.remat

    def __call__(
        self, hidden: jax.Array, skips: list[jax.Array], temb: jax.Array, context: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Uses up `skips` from its end. Returns the output before upsampling and the input of the last resnet."""
        first = len(self.resnets) - len(self.attentions)
        for i, resnet in enumerate(self.resnets):
            joined = jnp.concatenate([hidden, skips[-1 - i]], axis=-1)
            hidden = remat_call(self.remat, resnet, joined, temb)
            if i >= first:
                hidden = self.attentions[i - first](hidden, context)
        return hidden, joined

    def upsample(self, hidden: jax.Array, temb: jax.Array, size: tuple[int, int]) -> jax.Array:
        """To the size of the next level's skip tensors; does nothing at the last level."""
        for upsampler in self.upsamplers:
            hidden = upsampler(hidden, temb, size)
        return hidden


class UNetBackbone(nnx.Module):
    """The UNet without its output norm and convolution."""

    FACTORY = Factory

    def __init__(self, config: Any, *, dtype: Any, attention: str, remat: str, rngs: Keys):
        make = self.FACTORY(config, dtype, attention, remat, rngs)
        widths = config.block_out_channels
        self.config, self.dtype = config, dtype
        self.conv_in = Conv(config.in_channels, config.stem_channels, **make.kw)
        self._make_embeddings(config, make.kw)
        self.down_blocks = nnx.List([DownBlock(make, level) for level in range(len(widths))])
        self.mid_block = None if config.mid_block_type is None else MidBlock(make)
        self.up_blocks = nnx.List([UpBlock(make, index) for index in range(len(widths))])

    def _make_embeddings(self, config: Any, kw: dict[str, Any]) -> None:
        width = config.stem_channels
        self.time_embedding = TimestepEmbedding(width, config.time_embed_dim, config.time_cond_proj_dim, **kw)
        added = None
        if config.addition_embed_type is not None:
            added = TimestepEmbedding(config.projection_class_embeddings_input_dim, config.time_embed_dim, **kw)
        self.add_embedding = added

    def embed(
        self,
        timesteps: jax.Array,
        condition: Any,
        added: dict[str, jax.Array] | None,
        timestep_cond: jax.Array | None = None,
    ) -> jax.Array:
        """The time embedding (B, 4 C0) of timesteps (B,), with SDXL's text_time conditioning in it.

        `condition`, what `encode` and `decode` get as their context, is not in it. `timestep_cond` (B,
        time_cond_proj_dim) is a latent consistency model's guidance embedding.
        """
        config = self.config

        def wave(values: jax.Array, dim: int) -> jax.Array:
            flip, shift = config.flip_sin_to_cos, config.freq_shift
            return sinusoidal_embedding(values, dim, flip_sin_to_cos=flip, freq_shift=shift)

        if timestep_cond is not None and config.time_cond_proj_dim is None:
            raise UserError("this UNet has no time_cond_proj_dim, so it takes no guidance embedding")
        temb = self.time_embedding(wave(timesteps, config.block_out_channels[0]), timestep_cond)
        if self.add_embedding is None:
            return temb
        if added is None:
            raise UserError("addition_embed_type 'text_time' needs added={'text_embeds': ..., 'time_ids': ...}")
        text, ids = added["text_embeds"], added["time_ids"]  # (B, P), (B, 6)
        ids = wave(ids.reshape(-1), config.addition_time_embed_dim).reshape(text.shape[0], -1)
        return temb + self.add_embedding(jnp.concatenate([text.astype(jnp.float32), ids], axis=-1))

    def encode(
        self, latents: jax.Array, temb: jax.Array, context: Any, additions: list[jax.Array | None] | None = None
    ) -> tuple[jax.Array, list[jax.Array]]:
        """The lowest hidden state and all skip tensors.

        `additions`, one per level, are added to the hidden state that enters the level, and thereby to the skip tensor
        that is the same state: at the first level conv_in's output, at the others the downsampler's.
        """
        hidden, entered = self.conv_in(latents), latents
        skips = [hidden]
        for level, block in enumerate(self.down_blocks):
            if level:
                hidden = skips[-1] = entered = self._enter(level, hidden, entered)
            if additions is not None and additions[level] is not None:
                hidden = skips[-1] = hidden + additions[level]
            hidden, outputs = block(hidden, temb, context)
            skips += outputs
        return hidden, skips

    def _enter(self, level: int, hidden: jax.Array, entered: jax.Array) -> jax.Array:
        """What enters a level below the first, given the downsampler's output and what entered the level above."""
        return hidden

    def middle(self, hidden: jax.Array, temb: jax.Array, context: Any) -> jax.Array:
        return hidden if self.mid_block is None else self.mid_block(hidden, temb, context)

    def decode(
        self, hidden: jax.Array, skips: list[jax.Array], temb: jax.Array, context: Any
    ) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array, jax.Array]]]:
        """The output (B, h, w, C0), and per level from low to high resolution the three tensors around its last skip.

        These are: the skip tensor itself, the last resnet's input (hidden state and skip tensor side by side), and the
        level's output before upsampling.
        """
        taps = []
        for block in self.up_blocks:
            count = len(block.resnets)
            skips, own = skips[:-count], skips[-count:]
            hidden, joined = block(hidden, own, temb, context)
            taps.append((own[0], joined, hidden))
            if skips:
                hidden = block.upsample(hidden, temb, skips[-1].shape[1:3])
        return hidden, taps


class UNet2DConditionModel(UNetBackbone):
    """Predicts noise, velocity or sample, as the model was trained to."""

    def __init__(self, config: Any, *, dtype: Any, attention: str, remat: str, rngs: Keys):
        super().__init__(config, dtype=dtype, attention=attention, remat=remat, rngs=rngs)
        width = config.block_out_channels[0]
        self.conv_norm_out = GroupNorm(config.norm_num_groups, width, config.norm_eps, dtype=dtype)
        self.conv_out = Conv(width, config.out_channels, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        latents: jax.Array,
        timesteps: jax.Array,
        encoder_hidden_states: jax.Array,
        added: dict[str, jax.Array] | None = None,
        timestep_cond: jax.Array | None = None,
    ) -> jax.Array:
        """Latents (B, h, w, C), timesteps (B,), text states (B, L, D) -> (B, h, w, C_out) in the compute dtype.

        `added` is SDXL's {"text_embeds": (B, P), "time_ids": (B, 6)}; `timestep_cond` (B, time_cond_proj_dim) is the
        guidance embedding of a latent consistency model. h and w may be any: where a level's size is odd, upsampling
        goes to the size of the skip tensors.
        """
        temb = self.embed(timesteps, encoder_hidden_states, added, timestep_cond)
        hidden, skips = self.encode(latents, temb, encoder_hidden_states)
        hidden = self.middle(hidden, temb, encoder_hidden_states)
        hidden, _ = self.decode(hidden, skips, temb, encoder_hidden_states)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(hidden)))
