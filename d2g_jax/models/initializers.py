"""Initial weights from typed keys, without a program to compile for every shape.

XLA needs about a second on a CPU to compile one threefry draw, and a UNet has some forty shapes. So numbers come in
chunks of one size, and a weight takes as many chunks as it needs: one program for all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]

_CHUNK = 65_536


@functools.partial(jax.jit, inline=True)
def _draw(key: jax.Array, index: jax.Array) -> jax.Array:
    return jax.random.uniform(jax.random.fold_in(key, index), (_CHUNK,), jnp.float32, -1.0, 1.0)


@functools.partial(jax.jit, static_argnames="shape")
def _draw_traced(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    size = math.prod(shape)
    chunks = jax.vmap(_draw, (None, 0))(key, jnp.arange(-(-size // _CHUNK)))
    return chunks.reshape(-1)[:size].reshape(shape)


def symmetric_uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array | np.ndarray:
    """float32 U(-1, 1); the same numbers inside of `jax.jit` and outside, where they come as a numpy array."""
    if isinstance(key, jax.core.Tracer):
        return _draw_traced(key, shape)
    size = math.prod(shape)
    chunks = [np.asarray(_draw(key, index)) for index in range(-(-size // _CHUNK))]
    return np.concatenate(chunks)[:size].reshape(shape)


def torch_uniform(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default for linear and convolution weights.

    `shape` is (in, out) or (kh, kw, in, out): all axes but the last are the fan-in.
    """
    return jnp.asarray(symmetric_uniform(key, shape) * np.float32(1 / math.sqrt(math.prod(shape[:-1]))), dtype)


def normal(stddev: float) -> Initializer:
    """N(0, stddev^2)."""

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        # (-1, 1) half open: the lower end would be infinite
        inside = jnp.clip(symmetric_uniform(key, shape), -1 + 1e-7, 1 - 1e-7)
        return (math.sqrt(2) * stddev * jax.lax.erf_inv(inside)).astype(dtype)

    return initialize


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """For layers that must not change a pretrained network at first."""
    return full(shape, 0.0, dtype)


def full(shape: tuple[int, ...], value: float, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """A constant array, again without a program for its shape."""
    return jnp.asarray(np.full(shape, value, np.float32), dtype)
