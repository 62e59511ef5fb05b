"""Attention and the transformer blocks of the UNet, on (B, T, C) tokens: names of diffusers' state dict.

Two constants are easy to get wrong and are therefore said here: the GroupNorm at the entry of a transformer has eps
1e-6 (1e-5 in the UNet's resnets), and GEGLU uses the exact erf GELU.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from d2g_jax.errors import UserError
from d2g_jax.models.layers import Conv, GroupNorm, LayerNorm, Linear, remat_call
from d2g_jax.models.network import Keys
from d2g_jax.models.platform import platform

ATTENTIONS = ("auto", "xla", "cudnn", "blocked", "plain")

_MANY_KEYS = 512  # from here on a CPU's time goes into writing the weights and reading them again
_BLOCK_BYTES = 16 * 2**20  # of weights at a time: stays in the cache that the cores share


def attention_implementation(attention: str, head_dim: int, dtype: Any, keys: int) -> str:
    """One of "xla", "cudnn", "blocked", "plain" for the switch "auto" or one of these; `keys` is their number S.

    "auto" takes cuDNN's fused kernel where it exists on every GPU that has one: half precision, heads of at most 128
    channels in multiples of 8. SD 1.x's 160-channel heads fall back to XLA. On a CPU it takes blocks where there are
    many keys. Raises `UserError` for another name.
    """
    if attention not in ATTENTIONS:
        raise UserError(f"attention is {attention!r}; choose one of {', '.join(ATTENTIONS)}")
    if attention != "auto":
        return attention
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    if platform() == "cpu":
        return "blocked" if keys >= _MANY_KEYS else "xla"
    fused = half and head_dim % 8 == 0 and head_dim <= 128 and platform() == "gpu"
    return "cudnn" if fused else "xla"


def dot_product_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, attention: str = "auto", upcast: bool = False
) -> jax.Array:
    """softmax(query key^T / sqrt(d)) value with the softmax in float32: (B, T, N, d), (B, S, N, d) x 2 -> (B, T, N, d).

    `upcast` computes the logits from float32 queries and keys (SD 2.1's `upcast_attention`); cuDNN accumulates them in
    float32 anyway. "plain" is einsum and softmax: the one to differentiate twice. "blocked" never holds all weights,
    and computes them again in its backward pass.
    """
    dtype, head_dim = query.dtype, query.shape[-1]
    implementation = attention_implementation(attention, head_dim, dtype, key.shape[1])
    if upcast and implementation != "cudnn":
        query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    if implementation == "blocked":
        return _in_blocks(query, key, value).astype(dtype)
    if implementation != "plain":
        return jax.nn.dot_product_attention(query, key, value, implementation=implementation).astype(dtype)
    logits = jnp.einsum("btnd,bsnd->bnts", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits / math.sqrt(head_dim), axis=-1).astype(value.dtype)
    return jnp.einsum("bnts,bsnd->btnd", weights, value).astype(dtype)


def _in_blocks(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`dot_product_attention` in float32, for a few heads and rows of queries at a time, all samples together.

    A batch that is split over devices stays split: the loops are over heads and queries.
    """
    batch, rows, heads, head_dim = query.shape
    keys, group = key.shape[1], 2 if heads % 2 == 0 else 1
    blocks = -(-rows * batch * group * keys * 4 // _BLOCK_BYTES)
    size = -(-rows // blocks)
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    query = jnp.pad(query / math.sqrt(head_dim), ((0, 0), (0, blocks * size - rows), (0, 0), (0, 0)))
    query = query.reshape(batch, blocks, size, heads // group, group, head_dim).transpose(3, 1, 0, 4, 2, 5)
    key = key.reshape(batch, keys, heads // group, group, head_dim).transpose(2, 0, 3, 4, 1)
    value = value.reshape(batch, keys, heads // group, group, head_dim).transpose(2, 0, 3, 1, 4)

    def of_heads(arguments: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        query, key, value = arguments  # (blocks, B, group, size, d), (B, group, d, S), (B, group, S, d)
        return jax.lax.map(jax.checkpoint(lambda block: _block(block, key, value)), query)

    out = jax.lax.map(of_heads, (query, key, value))  # (heads / group, blocks, B, group, size, d)
    return out.transpose(2, 1, 4, 0, 3, 5).reshape(batch, blocks * size, heads, head_dim)[:, :rows]


def _block(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention of scaled queries (B, n, t, d) to keys (B, n, d, S) and values (B, n, S, d)."""
    logits = jnp.einsum("bntd,bnds->bnts", query, key)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    return jnp.einsum("bnts,bnsd->bntd", weights, value) / weights.sum(-1, keepdims=True)


class Attention(nnx.Module):
    """Multi-head attention of (B, T, C) on itself or on a context (B, S, D)."""

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        head_dim: int,
        context_dim: int | None = None,
        upcast: bool = False,
        attention: str = "auto",
        dtype: Any = jnp.float32,
        rngs: Keys,
    ):
        inner, source = heads * head_dim, channels if context_dim is None else context_dim
        self.to_q = Linear(channels, inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_k = Linear(source, inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_v = Linear(source, inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_out = nnx.List([Linear(inner, channels, dtype=dtype, rngs=rngs)])
        self.heads, self.upcast, self.attention = heads, upcast, attention

    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        context = x if context is None else context
        query, key, value = (
            projection(source).reshape(*source.shape[:2], self.heads, -1)  # (B, T or S, N, d)
            for projection, source in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        out = dot_product_attention(query, key, value, attention=self.attention, upcast=self.upcast)
        return self.to_out[0](out.reshape(*x.shape[:2], -1))


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
        self, channels: int, *, heads: int, context_dim: int, upcast: bool, attention: str, dtype: Any, rngs: Keys
    ):
        kw = {"heads": heads, "head_dim": channels // heads, "upcast": upcast, "attention": attention}
        self.norm1 = LayerNorm(channels, dtype=dtype)
        self.attn1 = Attention(channels, **kw, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(channels, dtype=dtype)
        self.attn2 = Attention(channels, context_dim=context_dim, **kw, dtype=dtype, rngs=rngs)
        self.norm3 = LayerNorm(channels, dtype=dtype)
        self.ff = FeedForward(channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


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
        block = {"heads": heads, "context_dim": context_dim, "upcast": upcast, "attention": attention, **kw}

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
        hidden = self.proj_in(self.norm(x))
        hidden = hidden.reshape(x.shape[0], -1, x.shape[-1])  # (B, H W, C)
        for block in self.transformer_blocks:
            hidden = remat_call(self.remat, block, hidden, context)
        return self.proj_out(hidden.reshape(x.shape)) + x
