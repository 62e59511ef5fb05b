"""The bridge between NNX modules and plain parameter trees."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from d2g_jax.models.layers import Linear
from d2g_jax.models.network import Network


class Chain(nnx.Module):
    """Twelve layers in a list: with string keys "10" would come before "2"."""

    def __init__(self, rngs):
        self.layers = nnx.List([Linear(3, 3, rngs=rngs) for _ in range(12)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture(scope="module")
def chain() -> Network:
    return Network.build(None, Chain)


def test_lists_of_more_than_ten_keep_their_order(chain):
    params = chain.init(jax.random.key(0))
    assert sorted(params["layers"], key=int) == [str(i) for i in range(12)]
    x = expected = np.eye(3, dtype=np.float32)
    for i in range(12):
        expected = expected @ np.asarray(params["layers"][str(i)]["kernel"])
    np.testing.assert_allclose(chain.apply(params, x), expected, rtol=1e-5, atol=1e-7)


def test_init_has_the_abstract_shapes_and_follows_the_key(chain):
    params, again = chain.init(jax.random.key(0)), chain.init(jax.random.key(0))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    assert shapes == chain.abstract()
    jax.tree.map(np.testing.assert_array_equal, params, again)
    kernels = [layer["kernel"] for layer in params["layers"].values()]
    kernels.append(chain.init(jax.random.key(1))["layers"]["0"]["kernel"])
    assert len({np.asarray(kernel).tobytes() for kernel in kernels}) == 13


def test_another_networks_tree_is_refused(chain):
    params = chain.init(jax.random.key(0))
    del params["layers"]["11"]
    with pytest.raises(ValueError, match="paths differ"):
        chain.apply(params, np.eye(3, dtype=np.float32))
