"""The VGG trunk: layout, batch norm folding and training statistics, pooling, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2g_jax.models import vgg
from d2g_jax.pipeline.weights import to_state_dict
from d2g_jax.runtime.errors import UserError

NARROW = vgg.VGGConfig(widths=(4, 6, 6, 8, 8))


def paths(params):
    return set(to_state_dict(params))


def test_author_layout():
    params = vgg.build_training(vgg.VGGConfig()).abstract()
    convs = {int(i) for layers in params.values() for i, layer in layers.items() if "kernel" in layer}
    norms = {int(i) for layers in params.values() for i, layer in layers.items() if "mean" in layer}
    assert convs == {0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40}
    assert norms == {i + 1 for i in convs}
    heads = 64 + 128 + 256 + 512 + 512
    trained, _ = vgg.split_statistics(params)
    assert sum(leaf.size for leaf in jax.tree.leaves(trained)) + heads == 14_725_184
    wide, _ = vgg.split_statistics(vgg.build_training(vgg.VGGConfig(in_channels=16)).abstract())
    assert sum(leaf.size for leaf in jax.tree.leaves(wide)) + heads == 14_732_096


def test_pixel_layout():
    params = vgg.build(vgg.PIXELS).abstract()
    assert [sorted(map(int, layers)) for layers in params.values()] == [
        [0, 2],
        [5, 7],
        [10, 12, 14],
        [17, 19, 21],
        [24, 26, 28],
    ]
    taps = jax.eval_shape(lambda p: vgg.build(vgg.PIXELS).apply(p, jnp.zeros((1, 32, 32, 3))), params)
    assert [tap.shape[1:] for tap in taps] == [(32, 32, 64), (16, 16, 128), (8, 8, 256), (4, 4, 512), (2, 2, 512)]


def test_tap_shapes_follow_the_latent():
    network = vgg.build(NARROW)
    for size, expected in ((32, [32, 32, 32, 16, 8]), (9, [9, 9, 9, 4, 2])):
        taps = jax.eval_shape(network.apply, network.abstract(), jax.ShapeDtypeStruct((2, size, size, 4), jnp.float32))
        assert [tap.shape for tap in taps] == [(2, s, s, c) for s, c in zip(expected, NARROW.widths, strict=True)]


@pytest.fixture(scope="module")
def trained():
    """A trunk with batch norms, every tensor at random."""
    rng = np.random.default_rng(0)
    value = lambda leaf: rng.random(leaf.shape, np.float32) - np.float32(0.5 if len(leaf.shape) == 4 else -0.5)  # noqa: E731
    return jax.tree.map(value, vgg.build_training(NARROW).abstract())


def test_folding_keeps_the_features(trained):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 8, 4)), jnp.float32)
    expected = jax.jit(vgg.build_training(NARROW).apply)(trained, x)
    folded = vgg.fold_batch_norm(*vgg.split_statistics(trained))
    assert jax.tree.structure(folded) == jax.tree.structure(vgg.build(NARROW).abstract())
    for got, want in zip(jax.jit(vgg.build(NARROW).apply)(folded, x), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * float(want.max()))


def test_training_statistics_match_torch(trained):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(2).normal(size=(3, 8, 8, 4)).astype(np.float32)
    network = vgg.build_training(NARROW)
    taps, batch = jax.jit(lambda p, x: network.apply(p, x, method="train_features"))(trained, x)
    params, statistics = vgg.split_statistics(trained)
    running = jax.tree.map(lambda old, new: old + 0.1 * (new - old), statistics, batch)

    state = {key: torch.tensor(value) for key, value in to_state_dict(trained).items()}
    hidden, expected = torch.tensor(x.transpose(0, 3, 1, 2)), []
    for s, indices in enumerate(vgg.conv_indices(NARROW)):
        for i in indices:
            conv, norm = (f"slice{s + 1}.{i + k}." for k in (0, 1))
            hidden = torch.nn.functional.conv2d(hidden, state[conv + "weight"], state[conv + "bias"], padding=1)
            buffers = state[norm + "running_mean"], state[norm + "running_var"]
            weights = state[norm + "weight"], state[norm + "bias"]
            hidden = torch.nn.functional.batch_norm(hidden, *buffers, *weights, training=True).relu()
        if NARROW.pools[s]:
            hidden = torch.nn.functional.max_pool2d(hidden, 2)
        expected.append(hidden.numpy().transpose(0, 2, 3, 1))
    for got, want in zip(taps, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    for key, value in to_state_dict(vgg.merge_statistics(params, running)).items():
        np.testing.assert_allclose(value, state[key], rtol=1e-4, atol=1e-5)  # torch updated its buffers in place


def test_statistics_split_and_merge(trained):
    params, statistics = vgg.split_statistics(trained)
    assert not any(key.endswith(("running_mean", "running_var")) for key in paths(params))
    assert all(key.endswith(("running_mean", "running_var")) for key in paths(statistics))
    merged = vgg.merge_statistics(params, statistics)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), merged, trained))


def test_max_pool_and_its_gradient():
    x = jnp.asarray(np.random.default_rng(3).permutation(2 * 5 * 4 * 3).reshape(2, 5, 4, 3), jnp.float32)
    window = lambda x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")  # noqa: E731
    assert (vgg.max_pool(x) == window(x)).all()
    weights = jnp.arange(2 * 2 * 2 * 3.0).reshape(2, 2, 2, 3)
    gradients = [jax.grad(lambda x, f=f: (f(x) * weights).sum())(x) for f in (vgg.max_pool, window)]
    assert (gradients[0] == gradients[1]).all()


def test_config_round_trip_and_errors():
    for config in (NARROW, vgg.PIXELS):
        assert vgg.VGGConfig.from_json(config.to_json(), source="c.json") == config
    for change, words in (
        ({"width": 3}, "unknown key 'width'"),
        ({"pools": 3}, "pools = 3; give tuple"),
        ({"pools": [1, 0, 0, 1, 1]}, "pools = .*; give tuple"),
        ({"widths": [4, 6, 6, 8, 0]}, "widths=0; give a whole number from 1"),
        ({"tap": "middle"}, "tap is 'middle'"),
        ({"convs": [2, 2]}, "one length"),
    ):
        with pytest.raises(UserError, match=words) as error:
            vgg.VGGConfig.from_json({**NARROW.to_json(), **change}, source="c.json")
        assert str(error.value).startswith("c.json: ")
