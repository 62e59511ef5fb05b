"""Sharding rules as path patterns, and the checks of batch and mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from d2g_jax.runtime import mesh
from d2g_jax.runtime.errors import UserError


@pytest.mark.parametrize(
    ("path", "shape", "fsdp", "spec"),
    [
        ("generator/conv_in/kernel", (3, 3, 4, 320), 2, P()),  # small
        ("generator/mid/kernel", (3, 3, 320, 640), 4, P(None, None, None, "fsdp")),  # the largest dimension
        ("generator/mid/kernel", (3, 3, 320, 642), 4, P(None, None, "fsdp")),  # the largest that fits
        ("generator/mid/kernel", (641, 641), 4, P()),  # none fits
        ("generator/norm/scale", (2**15,), 4, P()),  # by name
        ("generator/mid/kernel", (3, 3, 320, 640), 1, P()),
    ],
)
def test_leaf_spec(path, shape, fsdp, spec):
    assert mesh.leaf_spec(path, shape, fsdp) == spec


def test_place_keeps_values_and_splits_large_leaves():
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    m = mesh.make_mesh(fsdp=2)
    tree = {"a": {"kernel": np.arange(2**15, dtype=np.float32).reshape(128, 256)}, "step": np.int32(3)}
    placed = mesh.place(tree, m)
    np.testing.assert_array_equal(placed["a"]["kernel"], tree["a"]["kernel"])
    assert placed["a"]["kernel"].sharding.spec == P(None, "fsdp")
    assert placed["a"]["kernel"].addressable_shards[0].data.shape == (128, 128)
    batch = mesh.place_batch({"x": np.arange(8.0, dtype=np.float32)}, m)
    assert [s.data.tolist() for s in batch["x"].addressable_shards] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert float(jnp.sum(batch["x"])) == 28


def test_mesh_must_be_the_devices():
    with pytest.raises(UserError, match=r"mesh\.fsdp=7"):
        mesh.make_mesh(fsdp=7)
    with pytest.raises(UserError, match=r"mesh\.data=5"):
        mesh.make_mesh(data=5)


def test_batches_and_groups_must_divide():
    m = mesh.make_mesh()
    shards = mesh.batch_shards(m)
    mesh.check_batch(m, 4 * shards, shards)
    with pytest.raises(UserError, match=r"train\.batch_size"):
        mesh.check_batch(m, 4 * shards + 1, shards)
    if shards > 1:
        with pytest.raises(UserError, match=r"train\.groups"):
            mesh.check_batch(m, 4 * shards, 1)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What `mesh.arrange` looks at of a device."""

    id: int
    coords: tuple[int, ...]
    device_kind: str
    slice_index: int = 0
    platform: str = "tpu"
    core_on_chip: int = 0

    @property
    def process_index(self):
        return self.slice_index


def chips(kind, *sides, slices=1):
    places = [tuple(reversed(place)) for place in np.ndindex(*reversed((*sides, 1)[:3]))]
    return [Chip(s * len(places) + i, at, kind, s) for s in range(slices) for i, at in enumerate(places)]


@pytest.mark.parametrize(
    ("devices", "shape"),
    [
        (chips("TPU v6 lite", 4, 4), (2, 8)),
        (chips("TPU v6 lite", 8, 8), (4, 16)),
        (chips("TPU v5", 4, 4, 4), (8, 8)),
        (chips("TPU v5 lite", 4, 4), (1, 16)),
        (chips("TPU v5 lite", 4, 4, slices=2), (2, 16)),
        (chips("TPU v5 lite", 4, 4, slices=4), (8, 8)),
        (chips("TPU v5 lite", 4, 4, slices=2), (1, 32)),
    ],
)
def test_every_mesh_can_be_laid_over_slices(devices, shape):
    """Each device once; parameters are gathered inside a slice wherever `data` has room for the slices."""
    arranged = mesh.arrange(shape, devices)
    assert arranged.shape == shape
    assert sorted(chip.id for chip in arranged.flat) == list(range(len(devices)))
    slices = len({chip.slice_index for chip in devices})
    if shape[0] % slices == 0:
        assert all(len({chip.slice_index for chip in row}) == 1 for row in arranged)


def test_a_mesh_that_does_not_lie_over_slices_is_refused():
    with pytest.raises(UserError, match=r"mesh\.data=1 x mesh\.fsdp=12 .*choose another mesh\.fsdp"):
        mesh.arrange((1, 12), chips("TPU v5 lite", 4, 2, slices=2)[:12])


def test_rows_of_one_process_are_all_rows():
    assert mesh.own_rows(mesh.make_mesh(), 8 * jax.device_count()).tolist() == [*range(8 * jax.device_count())]
