"""softmax(Q K^T / sqrt(d)) V, formulated for the platform that a program is made for."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from d2g_jax.models.platform import platform
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.sharding import shards

ATTENTIONS = ("auto", "xla", "cudnn", "flash", "blocked", "plain", "twice")

MANY_KEYS = 512
"""From here on the time goes into writing the weights and reading them again."""

_BLOCK_BYTES = 16 * 2**20  # of weights at a time: stays in the cache that a CPU's cores share
_TILES = (512, 256, 128)  # of queries and of keys in a TPU's vector memory; 128 is its least


def attention_implementation(attention: str, head_dim: int, dtype: Any, rows: int, keys: int) -> str:
    """One of "xla", "cudnn", "flash", "blocked", "plain" for the switch "auto" or one of these.

    "auto" takes a fused kernel, which never writes its weights, in half precision: on GPUs cuDNN's, which every GPU has
    for heads of at most 128 channels in multiples of 8 (SD 1.x's 160-channel heads fall back to XLA); on TPUs, whose
    half precision is bfloat16, JAX's flash attention, where there are many keys and its tiles divide `rows` and `keys`,
    the numbers T and S of queries and keys. On a CPU it takes blocks where there are many keys. "twice" is for what is
    differentiated twice: blocks where there are many keys, else plain. Raises `UserError` for another name.
    """
    if attention not in ATTENTIONS:
        raise UserError(f"attention is {attention!r}; choose one of {', '.join(ATTENTIONS)}")
    many = keys >= MANY_KEYS
    if attention == "twice":
        return "blocked" if many else "plain"
    if attention != "auto":
        return attention
    dtype = jnp.dtype(dtype)
    if platform() == "cpu" and many:
        return "blocked"
    if platform() == "gpu" and dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128:
        return "cudnn"
    if platform() == "tpu" and dtype == jnp.bfloat16 and many and head_dim <= 256:
        return "xla" if rows % _TILES[-1] or keys % _TILES[-1] else "flash"
    return "xla"


def dot_product_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, attention: str = "auto", upcast: bool = False
) -> jax.Array:
    """softmax(query key^T / sqrt(d)) value with the softmax in float32: (B, T, N, d), (B, S, N, d) x 2 -> (B, T, N, d).

    `upcast` computes the logits from float32 queries and keys (SD 2.1's `upcast_attention`); the fused kernels
    accumulate them in float32 anyway. "plain" is einsum and softmax. "blocked" never holds all weights, and computes
    them again in its backward pass, as "flash" does; it has derivatives of any order. "flash" on several devices must
    be traced for their mesh (`mesh.traced_for`): XLA cannot split the kernel by itself.
    """
    dtype, head_dim = query.dtype, query.shape[-1]
    implementation = attention_implementation(attention, head_dim, dtype, query.shape[1], key.shape[1])
    if implementation == "flash":
        return _flash(query, key, value)
    if upcast and implementation != "cudnn":
        query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    if implementation == "blocked":
        return _in_blocks(query, key, value).astype(dtype)
    if implementation != "plain":
        return jax.nn.dot_product_attention(query, key, value, implementation=implementation).astype(dtype)
    logits = jnp.einsum("btnd,bsnd->bnts", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits / math.sqrt(head_dim), axis=-1).astype(value.dtype)
    return jnp.einsum("bnts,bsnd->btnd", weights, value).astype(dtype)


def _flash(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """JAX's kernel for TPUs (Dao et al., "FlashAttention", 2022), on each device for its own samples."""
    # Not for everybody: importing Pallas takes a third of a second.
    from jax.experimental.pallas.ops.tpu import flash_attention as kernels

    rows, keys = (next((n for n in _TILES if x.shape[1] % n == 0), _TILES[-1]) for x in (query, key))
    sizes = kernels.BlockSizes(
        block_b=1,
        **dict.fromkeys(("block_q", "block_q_major_dkv", "block_q_dkv", "block_q_dq"), rows),
        **dict.fromkeys(("block_k_major", "block_k", "block_k_major_dkv", "block_k_dkv"), keys),
        **dict.fromkeys(("block_k_major_dq", "block_k_dq"), keys),
    )
    attend = functools.partial(kernels.flash_attention, sm_scale=query.shape[-1] ** -0.5, block_sizes=sizes)

    def of_samples(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return attend(*(x.swapaxes(1, 2) for x in (query, key, value))).swapaxes(1, 2)

    if shards() == 1:
        return of_samples(query, key, value)
    split = P(jax.sharding.get_abstract_mesh().axis_names)
    return jax.shard_map(of_samples, in_specs=split, out_specs=split, check_vma=False)(query, key, value)


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
