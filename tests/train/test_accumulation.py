"""Gradient accumulation and the layout of its parts, on a function whose sums are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2g_jax.runtime import mesh as meshes
from d2g_jax.train.accumulation import accumulate, count_parts

PARAMS = {"kernel": np.ones(3, np.float32)}
SAMPLES = np.arange(36, dtype=np.float32).reshape(12, 3)


def gradient_of(x, keys):
    """The gradient of sum(x @ kernel), and per sample its row, doubled, with its key's bits."""
    assert x.shape[0] == keys.shape[0]
    return {"kernel": x.sum(0)}, (2 * x, jax.vmap(jax.random.bits)(keys))


def whole(micro_batch):
    keys = jax.random.split(jax.random.key(0), 12)
    return accumulate(gradient_of, PARAMS, 12, micro_batch, jnp.asarray(SAMPLES), keys)


@pytest.mark.parametrize("micro_batch", [None, 12, 4, 1])
def test_parts_add_up_and_values_come_back_in_order(micro_batch):
    gradient, (doubled, bits) = whole(micro_batch)
    np.testing.assert_array_equal(gradient["kernel"], SAMPLES.sum(0))
    np.testing.assert_array_equal(doubled, 2 * SAMPLES)
    np.testing.assert_array_equal(bits, whole(None)[1][1])


def test_parts_keep_every_sample_on_its_device():
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    mesh = meshes.make_mesh(devices=jax.devices()[:2])
    x, keys = meshes.place_batch((SAMPLES, np.arange(12, dtype=np.uint32)), mesh)

    def step(x, seeds):
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(0), seed))(seeds)
        return accumulate(gradient_of, PARAMS, 12, 3, x, keys)

    with meshes.traced_for(mesh):
        assert count_parts(12, 3) == 2
        program = jax.jit(step).lower(x, keys).compile()
    gradient, (doubled, _) = jax.block_until_ready(program(x, keys))
    np.testing.assert_array_equal(gradient["kernel"], SAMPLES.sum(0))
    np.testing.assert_array_equal(doubled, 2 * SAMPLES)
    assert doubled.sharding.is_equivalent_to(x.sharding, 2)
    moves = [name for name in ("all-gather", "all-to-all", "collective-permute") if name in program.as_text()]
    assert moves == []  # an all-reduce of the gradient is all


def test_parts_must_divide():
    assert count_parts(12, 100) == 1
    with pytest.raises(ValueError, match="micro-batches of 5"):
        count_parts(12, 5)
