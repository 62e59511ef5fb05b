"""The device mesh: axes `data` and `fsdp`, sharding rules as path patterns, and the one way to place arrays on it.

The mesh never changes the algorithm. Whatever speaks of "each device's shard" (R1's single sample, in-shard shuffles)
speaks of the logical groups of `train.groups` instead, so that the numbers are those of one device on any mesh.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.sharding import kernel_spec

T = TypeVar("T")

BATCH = P(("data", "fsdp"))
"""Batches are split over both axes."""

REPLICATED_PATTERNS = (r"(^|/)(bias|scale|mean|var|count)$", r"^(step|images)$")
"""Paths that are never sharded: small leaves, where an all-gather costs more than the bytes are worth."""

_path_string = functools.partial(jax.tree_util.keystr, simple=True, separator="/")


def use_cpu_devices(count: int) -> None:
    """Splits the host CPU into `count` devices; no effect on accelerators. Call before the first use of a device.

    Two devices on two cores train 1.4 times as fast as one that uses both, because XLA's CPU backend runs many small
    operations on a single thread.
    """
    if jax.config.jax_num_cpu_devices != count:  # jax refuses any update once a backend runs, even of the same value
        try:
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError as error:
            remedy = "let the config file compute nothing with it"
            raise UserError(f"mesh.cpu_devices={count}: jax is at work already; {remedy}") from error


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh (data, fsdp) over `devices` (None: all of all processes); data = -1 takes what fsdp leaves.

    Raises `UserError` when the axes do not multiply to the number of devices, or cannot be laid over their links.
    """
    devices = jax.devices() if devices is None else list(devices)
    arranged = arrange(mesh_shape(data, fsdp, len(devices)), devices)
    return Mesh(arranged, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def arrange(shape: tuple[int, int], devices: Sequence[Any]) -> np.ndarray:
    """Devices (data, fsdp), neighbours near each other; slices of TPUs and nodes of GPUs lie along `data` if they can.

    `jax.make_mesh` does neither several slices nor axes that part a TPU's physical ones. Raises `UserError` for a shape
    that cannot be laid over the devices' links.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    along_data = math.gcd(shape[0], slices)
    outer = along_data, slices // along_data
    try:
        if slices == 1:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        inner = shape[0] // outer[0], shape[1] // outer[1]
        return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    except (NotImplementedError, ValueError) as error:
        raise UserError(
            f"mesh.data={shape[0]} x mesh.fsdp={shape[1]} cannot be laid over these {len(devices)} devices "
            f"({str(error).splitlines()[0]}); choose another mesh.fsdp"
        ) from error


def mesh_shape(data: int, fsdp: int, total: int) -> tuple[int, int]:
    """(data, fsdp) for `total` devices, without needing any; raises as `make_mesh` does."""
    if fsdp < 1 or total % fsdp:
        raise UserError(f"mesh.fsdp={fsdp} does not divide the {total} devices; give 1, or what does")
    data = total // fsdp if data == -1 else data
    if data * fsdp != total:
        raise UserError(f"mesh.data={data} x mesh.fsdp={fsdp} is not the {total} devices; mesh.data=-1 takes the rest")
    return data, fsdp


def leaf_spec(path: str, shape: tuple[int, ...], fsdp: int) -> P:
    """The partition of one leaf: its largest dimension that fsdp divides, unless it is small or named above."""
    return P() if any(re.search(p, path) for p in REPLICATED_PATTERNS) else kernel_spec(shape, fsdp)


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """A `NamedSharding` for every leaf of a tree of arrays or shapes (parameters, optimiser states, EMA)."""
    fsdp = mesh.shape["fsdp"]
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, leaf_spec(_path_string(path), leaf.shape, fsdp)), tree
    )


def place(tree: Any, mesh: Mesh) -> Any:
    """Puts a host tree on the mesh by the rules above; every process passes the same values.

    A process cuts its own devices' parts out; nothing is sent or compared. Of `jax.ShapeDtypeStruct`s the same with the
    shardings that such arrays would have: what a checkpoint is restored like, and what programs are planned with.
    """
    return jax.tree.map(_place_leaf, tree, tree_shardings(tree, mesh))


def _place_leaf(leaf: Any, sharding: NamedSharding) -> jax.Array | jax.ShapeDtypeStruct:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    if sharding.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def traced_for(mesh: Mesh) -> AbstractContextManager[Any]:
    """A context for tracing networks: activations are split over `mesh`, in steps gradients sharded like parameters.

    The numbers are the same without it; the memory and the traffic are not, and TPUs' flash attention needs it.
    """
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def constrain(tree: Any) -> Any:
    """Gradients sharded like their parameters, on the mesh that is traced for; without one nothing is done."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return tree
    fsdp = mesh.shape["fsdp"]
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.lax.with_sharding_constraint(leaf, leaf_spec(_path_string(path), leaf.shape, fsdp)), tree
    )


def own_rows(mesh: Mesh, size: int) -> np.ndarray:
    """Which rows of a batch of `size` lie on this process' devices: int64, ascending.

    On TPU slices they need not be one stretch: the mesh follows the links between chips, not the processes.
    """
    places = NamedSharding(mesh, BATCH).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[index] for index in places]))


def place_batch(batch: T, mesh: Mesh) -> T:
    """Makes global arrays of this process' rows of a batch, a tree of host arrays, split over the leading axis.

    Row i of the arrays is row `own_rows(...)[i]` of the batch, so that a batch is the same on any mesh.
    """
    sharding, share = NamedSharding(mesh, BATCH), mesh.size // len(mesh.local_devices)

    def place_rows(value: np.ndarray) -> jax.Array:
        shape = (len(value) * share, *value.shape[1:])
        rows = own_rows(mesh, shape[0])

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0])
            first = np.searchsorted(rows, start)
            return value[first : first + stop - start]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(place_rows, batch)


def place_whole_batch(batch: T, mesh: Mesh) -> T:
    """Splits a whole batch, the same host arrays in every process, over the leading axis."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda value: _place_leaf(value, sharding), batch)


def batch_shards(mesh: Mesh) -> int:
    """How many devices a batch is split over."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(
    mesh: Mesh, batch_size: int, groups: int, micro_batch: int | None = None, r1_micro_batch: int | None = None
) -> None:
    """Raises `UserError` unless the batch divides into groups, the groups into the mesh, and shares into micro-batches.

    A device's share of the batch is `batch_size` over the devices, for R1 `groups` over the devices; one that is not
    larger than its micro-batch is taken whole.
    """
    shards = batch_shards(mesh)
    if batch_size % groups:
        raise UserError(f"train.batch_size={batch_size} is not a multiple of train.groups={groups}; change one of them")
    if groups % shards:
        raise UserError(
            f"train.groups={groups} is not a multiple of the {shards} devices of the mesh; set it to {shards} or more"
        )
    shares = {"micro_batch": (batch_size // shards, micro_batch), "r1_micro_batch": (groups // shards, r1_micro_batch)}
    for name, (share, micro) in shares.items():
        if micro is not None and (micro < 1 or (share > micro and share % micro)):
            raise UserError(f"train.{name}={micro} does not divide the {share} samples of each of {shards} devices")
