"""All that a layer knows of a mesh: the samples of a batch lie apart, and kernels are gathered where they are used.

Where kernels are sharded too, XLA's partitioner may as well gather the activations and split the channels: every device
would then work on every sample. A constraint before and one behind each product and convolution leave it only the
kernels to gather: the one behind says so for the result, the one before for the gradient that the backward pass sends
on. The kernels' own constraint says when: left to itself the partitioner for TPUs makes a loop of each product and each
convolution, which passes the kernel's parts round and multiplies by one at a time, some tens of channels. The mesh is
the one that a program is traced for (`jax.sharding.use_abstract_mesh`); without one, as on a single device, nothing
here has any effect.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

_MIN_SHARDED_SIZE = 2**14


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


def kernel_spec(shape: tuple[int, ...], fsdp: int) -> P:
    """The partition of a kernel over `fsdp` devices: its largest dimension that they divide, unless it is small."""
    if fsdp > 1 and math.prod(shape) >= _MIN_SHARDED_SIZE:
        for axis in sorted(range(len(shape)), key=lambda i: -shape[i]):
            if shape[axis] % fsdp == 0:
                return P(*[None] * axis, "fsdp")
    return P()


def whole(kernel: jax.Array, dtype: Any) -> jax.Array:
    """`kernel` in `dtype` and in one piece: gathered from the devices that share it, and its gradient shared again."""
    kernel = kernel.astype(dtype)
    mesh = jax.sharding.get_abstract_mesh()
    spec = P() if mesh.empty else kernel_spec(kernel.shape, mesh.shape["fsdp"])
    if spec == P():
        return kernel
    # The first says where the gradient goes, and that what is sent has the kernel's new dtype.
    kernel = jax.lax.with_sharding_constraint(kernel, spec)
    return jax.lax.with_sharding_constraint(kernel, P())
