"""Optimisers: first moments in half precision."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from d2g_jax.digits.config import optimizer
from d2g_jax.runtime.errors import UserError
from d2g_jax.train.state import discriminator_optimizer, generator_optimizer

PARAMS = {"unet": {"kernel": jnp.linspace(-1, 1, 50)}, "heads": {"kernel": jnp.linspace(1, 2, 50)}}


def updated(make, config, dtype):
    config.moment_dtype = dtype
    adam = make(config, 64)
    state, params = adam.init(PARAMS), PARAMS
    for step in range(3):
        gradient = {name: {"kernel": jnp.cos(leaf["kernel"] * (step + 1))} for name, leaf in params.items()}
        updates, state = adam.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize(
    ("make", "part"), [(generator_optimizer, "generator"), (discriminator_optimizer, "discriminator")]
)
def test_bfloat16_first_moments(make, part):
    whole, _ = updated(make, optimizer()[part], "float32")
    half, state = updated(make, optimizer()[part], "bfloat16")
    for name, dtype in (("mu", "bfloat16"), ("nu", "float32")):
        found = jax.tree.leaves([tree for _, tree in optax.tree.get_all_with_path(state, name)])
        assert {str(leaf.dtype) for leaf in found} == {dtype}
    step = np.abs(np.asarray(whole["heads"]["kernel"] - PARAMS["heads"]["kernel"])).max()
    moved = [np.abs(np.asarray(half[name]["kernel"] - whole[name]["kernel"])).max() for name in PARAMS]
    if optimizer()[part].betas[0]:
        assert 0 < max(moved) < 0.02 * step  # bfloat16 has eight bits
    else:
        assert max(moved) == 0  # what is stored is not read again


def test_an_unknown_moment_dtype_is_refused():
    config = optimizer().generator
    config.moment_dtype = "float16"
    with pytest.raises(UserError, match=r"moment_dtype='float16'.*bfloat16"):
        generator_optimizer(config, 64)


def test_the_first_beta_changes_when_the_adversary_speaks():
    """As Adam with 0.9 before, and as Adam without momentum after: then the step is gradient over root mean square."""
    rates = optimizer().generator
    rates.regression_beta1, rates.warmup_images, rates.gradient_clip = 0.9, 0, 1e9
    rates.moment_dtype, rates.betas = "float32", (0.0, 0.99)
    by_phase, whole = generator_optimizer(rates, 4, 12), optax.adam(rates.learning_rate, 0.9, 0.99)
    gradients = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    params = {"w": jnp.zeros(5)}
    ours, theirs, squares = by_phase.init(params), whole.init(params), np.zeros(5)
    for count, gradient in enumerate(gradients, start=1):
        moved, ours = by_phase.update({"w": gradient}, ours, params)
        expected, theirs = whole.update({"w": gradient}, theirs, params)
        squares = 0.99 * squares + 0.01 * gradient**2
        if count > 3:
            expected = {"w": -rates.learning_rate * gradient / (np.sqrt(squares / (1 - 0.99**count)) + 1e-8)}
        np.testing.assert_allclose(moved["w"], expected["w"], rtol=1e-4)
