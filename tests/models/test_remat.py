"""What the backward pass computes again, by `remat`: the same gradients, more or fewer products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2g_jax.models.layers import REMATS, check_remat
from d2g_jax.models.network import Network
from d2g_jax.models.transformer import Transformer2DModel
from d2g_jax.runtime.errors import UserError

X = np.random.default_rng(0).standard_normal((2, 4, 4, 8)).astype(np.float32)
CONTEXT = np.random.default_rng(1).standard_normal((2, 3, 6)).astype(np.float32)


def gradient_by(remat):
    kw = {"heads": 2, "depth": 1, "context_dim": 6, "groups": 4, "attention": "plain", "remat": remat}
    network = Network.build(None, lambda rngs: Transformer2DModel(8, **kw, rngs=rngs))
    params = network.init(jax.random.key(0))
    loss = lambda params: jnp.sum(jnp.square(network.apply(params, X, CONTEXT)))  # noqa: E731
    return params, jax.jit(jax.grad(loss))


def products(jaxpr):
    """Matrix products of a jaxpr and all jaxprs inside it: with weights, and of batches (attention's)."""
    weights = batches = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            batched = bool(equation.params["dimension_numbers"][1][0])
            weights, batches = weights + (not batched), batches + batched
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                more = products(inner)
                weights, batches = weights + more[0], batches + more[1]
    return weights, batches


def test_policies_change_the_work_and_not_the_gradient():
    found, gradients = {}, {}
    for remat in REMATS:
        params, gradient = gradient_by(remat)
        found[remat] = products(jax.make_jaxpr(gradient)(params).jaxpr)
        gradients[remat] = jax.tree.leaves(gradient(params))
    none, elementwise, dots, full = (found[remat] for remat in REMATS)
    assert elementwise[0] == dots[0]
    assert elementwise[1] == none[1]
    assert dots[0] == none[0] < full[0]  # products with weights are kept
    assert none[1] < dots[1] == full[1]  # attention's are not
    for remat in REMATS[1:]:
        for ours, theirs in zip(gradients[remat], gradients["none"], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_an_unknown_policy_is_refused():
    with pytest.raises(UserError, match=r"train\.remat is 'half'; choose one of none, elementwise, dots, full"):
        check_remat("half")
