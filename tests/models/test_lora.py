"""Low-rank updates as functions on trees: nothing changes at first, the nearest of a rank, targets by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import LEAST_UNET as UNET

from d2g_jax.models import denoisers, lora
from d2g_jax.runtime.errors import UserError


def base(dtype=np.float32):
    """Random numbers in the shapes of a UNet."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(dtype), denoisers.build(UNET).abstract())


@pytest.mark.parametrize("targets", [("attention",), ("attention", "feed_forward", "convolutions"), ("all",)])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_an_update_changes_nothing_at_first(targets, dtype):
    whole, update = base(dtype), lora.init(jax.random.key(0), base(), 2, targets)
    merged = lora.merge(whole, update)
    assert jax.tree.structure(merged) == jax.tree.structure(whole)
    assert all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(whole), strict=True)
    )
    leaves = lora.flat(update)
    assert all((np.abs(leaf).max() > 0) == path.endswith("down") for path, leaf in leaves.items())
    shapes = jax.tree.map(lambda leaf: leaf.shape, lora.abstract(whole, 2, targets))
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, update)


def test_the_names_of_targets_mean_these_kernels():
    paths = lora.flat(base())
    found = {name: set(lora.target_paths(base(), (name,))) for name in lora.TARGETS}
    blocks = {path.rpartition("/attn")[0] for path in found["attention"]}
    assert len(found["attention"]) == 8 * len(blocks)  # q, k, v, out of self- and cross-attention
    assert {path.rpartition("/ff/")[0] for path in found["feed_forward"]} == blocks
    assert len(found["feed_forward"]) == 2 * len(blocks)
    assert found["convolutions"] == {
        path for path in paths if path.endswith("/kernel") and ("/conv" in path or "_shortcut" in path)
    }
    assert found["all"] == {path for path in paths if path.endswith("kernel")}


@pytest.mark.parametrize("shape", [(6, 5), (3, 3, 4, 5)])
def test_an_update_is_a_product_and_the_nearest_of_its_rank(shape):
    kernel = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    matrix = kernel.reshape(-1, 5)
    values = np.linalg.svd(matrix, compute_uv=False)
    for rank in (1, 3, 5, 9):
        update, error = lora.truncate(kernel, rank)
        assert update["down"].shape == (*shape[:-1], min(rank, 5))
        merged = lora.merge({"kernel": np.zeros(shape, np.float32)}, {"kernel": update})["kernel"]
        lost = np.linalg.norm(merged - kernel) / np.linalg.norm(kernel)
        assert error == pytest.approx(lost, abs=1e-6)
        assert error == pytest.approx(np.sqrt(np.sum(values[rank:] ** 2) / np.sum(values**2)), abs=1e-6)
    half = lora.merge({"kernel": kernel}, {"kernel": update}, -0.5)["kernel"]
    np.testing.assert_allclose(half, 0.5 * kernel, atol=1e-6)
    assert lora.truncate(np.zeros(shape, np.float32), 2)[1] == 0.0


def test_what_is_new_beside_a_frozen_base_stands_as_it_is():
    new = {"heads": {"0": np.ones(2)}}
    assert lora.merge({"unet": {"bias": np.zeros(2)}}, new).keys() == {"unet", "heads"}
    assert lora.merge({}, new) == new


@pytest.mark.parametrize(
    ("rank", "targets", "message"),
    [
        (9, ("attention",), r"^lora\.rank=9: .*attn1/to_k/kernel has sides 8 and 8; choose a lower rank$"),
        (2, ("attentions",), r"^lora\.targets: 'attentions' is unknown; choose of attention, feed_forward, conv"),
        (2, (), r"^lora\.targets=\(\): the network has none"),
    ],
)
def test_ranks_and_targets_that_are_refused(rank, targets, message):
    with pytest.raises(UserError, match=message):
        lora.init(jax.random.key(0), base(), rank, targets)
