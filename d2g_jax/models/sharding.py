"""All that a layer knows of a mesh: the samples of a batch lie apart, and stay so.

Where kernels are sharded too, XLA's partitioner may as well gather the activations and split the channels: every device
would then work on every sample. A constraint before and one behind each product and convolution leave it only the
kernels to gather: the one behind says so for the result, the one before for the gradient that the backward pass sends
on. The mesh is the one that a program is traced for (`jax.sharding.use_abstract_mesh`); without one, as on a single
device, nothing here has any effect.
"""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec as P


def shards() -> int:
    """Over how many devices the program that is being traced splits a batch: all of the mesh's, or one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def by_sample(x: jax.Array, axis: int = 0) -> jax.Array:
    """`x` with its samples, along `axis`, split over all axes of the mesh and nothing else split; its gradient too.

    The samples must be a multiple of `shards()`.
    """
    if shards() == 1:
        return x
    return jax.lax.with_sharding_constraint(x, P(*[None] * axis, jax.sharding.get_abstract_mesh().axis_names))
