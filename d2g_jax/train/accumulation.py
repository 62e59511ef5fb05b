"""Gradient accumulation: a step's samples in several parts, one after another, whose gradients are summed.

The parts are made so that no sample changes its device: each is an equal share of every device's samples. How many
there are decides the memory that activations take and nothing else: whatever is drawn, rolled or grouped is so before,
for the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from d2g_jax.models.network import Params
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.sharding import by_sample, shards


def count_parts(samples: int, micro_batch: int | None) -> int:
    """Into how many parts `samples` of all devices go when a device takes at most `micro_batch` of them at once.

    None takes all at once. Raises `ValueError` unless they divide (`mesh.check_batch` has told the user before).
    """
    share, rest = divmod(samples, shards())
    if micro_batch is None or share <= micro_batch:
        return 1
    if rest or share % micro_batch:
        raise ValueError(f"{samples} samples on {shards()} devices do not divide into micro-batches of {micro_batch}")
    return share // micro_batch


def accumulate(
    gradient_of: Callable[..., tuple[Params, Any]],
    params: Params,
    samples: int,
    micro_batch: int | None,
    *arguments: Any,
) -> tuple[Params, Any]:
    """The sum over parts of the first result of `gradient_of`, and the second results put together.

    Args:
      params: what the gradient is taken by; it has their shapes, dtypes and shardings.
      gradient_of: called with the same part of all `arguments`; gives a gradient, which is a sum over the part's
        samples (a mean over the batch is one divided by the whole batch's size), and a tree of values per sample
        (b, ...).
      samples, micro_batch: see `count_parts`. With one part there is no loop.
      arguments: trees of arrays (samples, ...).
    """
    parts = count_parts(samples, micro_batch)
    if parts == 1:
        gradient, values = gradient_of(*arguments)
        return meshes.constrain(gradient), values
    stacked = jax.tree.map(lambda x: _split(x, parts), arguments)

    def add(total: Params, part: Any) -> tuple[Params, Any]:
        gradient, values = gradient_of(*part)
        return meshes.constrain(jax.tree.map(jnp.add, total, gradient)), values

    zeros = meshes.constrain(jax.tree.map(jnp.zeros_like, params))
    total, values = jax.lax.scan(add, zeros, stacked)
    return total, jax.tree.map(_join, values)


def _split(x: jax.Array, parts: int) -> jax.Array:
    """(B, ...) to (parts, B / parts, ...)."""
    x = x.reshape(shards(), parts, -1, *x.shape[1:])  # each device's samples, part by part
    return by_sample(jnp.moveaxis(x, 1, 0).reshape(parts, -1, *x.shape[3:]), axis=1)


def _join(x: jax.Array) -> jax.Array:
    """The inverse of `_split`."""
    x = by_sample(x, axis=1).reshape(x.shape[0], shards(), -1, *x.shape[2:])
    return by_sample(jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[3:]))
