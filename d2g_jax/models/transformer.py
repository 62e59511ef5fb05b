"""The transformer blocks of the UNet, on (B, T, C) tokens: names of diffusers' state dict.

Two constants are easy to get wrong and are therefore said here: the GroupNorm at the entry of a transformer has eps
1e-6 (1e-5 in the UNet's resnets), and GEGLU uses the exact erf GELU.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from d2g_jax.models.attention import dot_product_attention
from d2g_jax.models.layers import Conv, GroupNorm, LayerNorm, Linear, remat_call
from d2g_jax.models.network import Keys


class Attention(nnx.Module):
    """Multi-head attention of (B, T, C) on itself or on a context (B, S, D)."""

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        head_dim: int,
        context_dim: int | None = None,
        use_bias: bool = False,
        upcast: bool = False,
        attention: str = "auto",
        dtype: Any = jnp.float32,
        rngs: Keys,
    ):
        inner, source = heads * head_dim, channels if context_dim is None else context_dim
        self.to_q = Linear(channels, inner, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.to_k = Linear(source, inner, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.to_v = Linear(source, inner, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.to_out = nnx.List([Linear(inner, channels, dtype=dtype, rngs=rngs)])
        self.heads, self.upcast, self.attention = heads, upcast, attention

    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        return self.attend(*self.project(x, context))

    def project(self, x: jax.Array, context: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries (B, T, N, d), keys and values (B, S, N, d)."""
        context = x if context is None else context
        return tuple(
            projection(source).reshape(*source.shape[:2], self.heads, -1)
            for projection, source in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """(B, T, C) of what `project` gives."""
        out = dot_product_attention(query, key, value, attention=self.attention, upcast=self.upcast)
        return self.to_out[0](out.reshape(*query.shape[:2], -1))


class ImageAttention(Attention):
    """Attention of an image's places to each other with a GroupNorm before and a residual: (B, H, W, C) -> same."""

    def __init__(self, channels: int, *, groups: int, eps: float, head_dim: int, scale: float = 1.0, **kw: Any):
        super().__init__(channels, heads=channels // head_dim, head_dim=head_dim, use_bias=True, **kw)
        self.group_norm = GroupNorm(groups, channels, eps, dtype=kw["dtype"])
        self.output_scale_factor = scale

    def __call__(self, x: jax.Array, context: Any = None) -> jax.Array:
        tokens = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        return (x + super().__call__(tokens).reshape(x.shape)) / self.output_scale_factor


class GEGLU(nnx.Module):
    """value * GELU(gate), both projected from x; the GELU is the exact erf form (Shazeer 2020)."""

    def __init__(self, channels: int, inner: int, *, dtype: Any = jnp.float32, rngs: Keys):
        self.proj = Linear(channels, 2 * inner, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        value, gate = jnp.split(self.proj(x), 2, axis=-1)
        return value * jax.nn.gelu(gate, approximate=False)


class Identity(nnx.Module):
    """Keeps the place of a PyTorch module without parameters, so that the ones after it keep their numbers."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class FeedForward(nnx.Module):
    """GEGLU and a linear layer, four times as wide inside: (B, T, C) -> (B, T, C)."""

    def __init__(self, channels: int, *, dtype: Any = jnp.float32, rngs: Keys):
        kw = {"dtype": dtype, "rngs": rngs}
        self.net = nnx.List([GEGLU(channels, 4 * channels, **kw), Identity(), Linear(4 * channels, channels, **kw)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nnx.Module):
    """Self-attention, cross-attention and feed-forward, each after a LayerNorm and with a residual."""

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        context_dim: int,
        upcast: bool,
        attention: str,
        remat: str = "none",
        dtype: Any,
        rngs: Keys,
    ):
        kw = {"heads": heads, "head_dim": channels // heads, "upcast": upcast, "attention": attention}
        self.norm1 = LayerNorm(channels, dtype=dtype)
        self.attn1 = Attention(channels, **kw, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(channels, dtype=dtype)
        self.attn2 = Attention(channels, context_dim=context_dim, **kw, dtype=dtype, rngs=rngs)
        self.norm3 = LayerNorm(channels, dtype=dtype)
        self.ff = FeedForward(channels, dtype=dtype, rngs=rngs)
        # "elementwise" is for what lies between attentions, which keep what they want; the others are for all of it.
        self.whole, self.parts = ("none", remat) if remat == "elementwise" else (remat, "none")

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        return remat_call(self.whole, self, x, context, method="_forward")

    def _forward(self, x: jax.Array, context: jax.Array) -> jax.Array:
        part = functools.partial(remat_call, self.parts, self)
        x = x + self.attn1.attend(*part(x, method="_self"))
        x = x + self.attn2.attend(*part(x, context, method="_cross"))
        return x + part(x, method="_feed")

    def _self(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.attn1.project(self.norm1(x))

    def _cross(self, x: jax.Array, context: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.attn2.project(self.norm2(x), context)

    def _feed(self, x: jax.Array) -> jax.Array:
        return self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """Transformer blocks over the pixels of (B, H, W, C), with cross-attention to a context (B, S, D)."""

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        depth: int,
        context_dim: int,
        groups: int = 32,
        use_linear_projection: bool = False,
        upcast: bool = False,
        attention: str = "auto",
        remat: str = "none",
        dtype: Any = jnp.float32,
        rngs: Keys,
    ):
        kw = {"dtype": dtype, "rngs": rngs}
        block = {"heads": heads, "context_dim": context_dim, "upcast": upcast, "attention": attention}
        block |= {"remat": remat, **kw}

        def project() -> nnx.Module:
            return (
                Linear(channels, channels, **kw)
                if use_linear_projection
                else Conv(channels, channels, 1, padding=0, **kw)
            )

        self.norm = GroupNorm(groups, channels, 1e-6, dtype=dtype)
        self.proj_in = project()
        self.transformer_blocks = nnx.List([BasicTransformerBlock(channels, **block) for _ in range(depth)])
        self.proj_out = project()
        self.remat = remat

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        hidden = remat_call(self.remat, self, x, method="_enter")
        hidden = hidden.reshape(x.shape[0], -1, x.shape[-1])  # (B, H W, C)
        for block in self.transformer_blocks:
            hidden = block(hidden, context)
        return self.proj_out(hidden.reshape(x.shape)) + x

    def _enter(self, x: jax.Array) -> jax.Array:
        return self.proj_in(self.norm(x))
