"""Gaussian noise that is the same number for number on every backend, jax version and device count.

`jax.random.normal` is only specified up to floating-point error, and a record that stores a seed in place of its noise
needs the very bits that the teacher saw. So 16 threefry bits, which are integers and exact everywhere, index a table of
65,536 fp16 quantiles of the normal distribution.
"""

from __future__ import annotations

import functools
import hashlib
import statistics
import zlib

import jax
import jax.numpy as jnp
import numpy as np

IMPLEMENTATION = "threefry2x32 bits, 65536 normal quantiles in fp16, version 1"
"""Named in every manifest of pairs; a reader refuses noise of another implementation."""

_TABLE_SHA256 = "c84e2ee9a90a7a594e0c266c687ccb9dbfe20d0c0040f95fe05e2511d533ad11"


@functools.cache
def quantiles() -> np.ndarray:
    """The table: float16 (65536,), entry i = the standard normal quantile of (i + 1/2) / 65536.

    The half table is mirrored, so that its mean is exactly zero. Raises `RuntimeError` when this platform's `log` and
    `sqrt` round to another table than the one that every record was made with.
    """
    inverse = statistics.NormalDist().inv_cdf
    upper = np.array([inverse((i + 0.5) / 65536) for i in range(32768, 65536)]).astype(np.float16)
    table = np.concatenate([-upper[::-1], upper])
    digest = hashlib.sha256(table.astype("<f2").tobytes()).hexdigest()
    if digest != _TABLE_SHA256:
        raise RuntimeError(f"the noise table came out as {digest[:12]} on this platform, expected {_TABLE_SHA256[:12]}")
    return table


def purpose_key(seed: int, purpose: str) -> jax.Array:
    """A typed threefry key for one purpose, whatever `jax_default_prng_impl` says; fold steps and record ids in."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), zlib.crc32(purpose.encode()))


def record_bits(seed: int, record_ids: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint16 bits (B, *shape): a pure function of (seed, record id); a record's bits do not depend on its batch."""
    key = purpose_key(seed, "pair noise")
    draw = lambda record_id: jax.random.bits(jax.random.fold_in(key, record_id), shape, jnp.uint16)  # noqa: E731
    return jax.vmap(draw)(record_ids)


def from_bits(bits: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Standard normal noise of `bits`' shape; every value is exactly representable in fp16."""
    return jnp.asarray(quantiles())[bits.astype(jnp.int32)].astype(dtype)


def record_noise(seed: int, record_ids: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """float32 noise (B, *shape) of the records `record_ids`."""
    return from_bits(record_bits(seed, record_ids, shape))


def bits_hash(bits: np.ndarray) -> int:
    """A signed 64-bit hash of one record's bits (little-endian), as stored beside its seed."""
    digest = hashlib.sha256(np.ascontiguousarray(bits, dtype="<u2").tobytes()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
