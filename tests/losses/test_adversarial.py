"""GAN losses, R1 and mix-and-match against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2g_jax.losses import adversarial

RNG = np.random.default_rng(0)


def test_losses_at_known_logits():
    zero = [jnp.zeros((2, 4, 4)), jnp.zeros((2, 1, 1))]
    np.testing.assert_allclose(adversarial.discriminator_loss("non_saturating", zero, zero), 2 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(adversarial.generator_loss("non_saturating", zero, None), np.log(2), rtol=1e-6)
    sure = [jnp.full((1, 2, 2), 3.0)]
    fooled = adversarial.generator_loss("non_saturating", sure, None)
    assert float(fooled[0]) == pytest.approx(np.log1p(np.exp(-3.0)), rel=1e-5)


REAL, FAKE = (
    [jnp.asarray([[[0.5, 2.0]]]), jnp.asarray([[[-1.0]]])],
    [jnp.asarray([[[-3.0, 0.25]]]), jnp.asarray([[[1.0]]])],
)
"""Logits of one sample: a head with two locations, and one with one."""


def test_hinge_by_hand():
    """Real: max(0, 1 - D) of 0.5, 2 and -1 is 0.5, 0 and 2. Fake: max(0, 1 + D) of -3, 0.25 and 1 is 0, 1.25 and 2."""
    expected = ((0.5 + 0.0) / 2 + 2.0) / 2 + ((0.0 + 1.25) / 2 + 2.0) / 2
    assert float(adversarial.discriminator_loss("hinge", REAL, FAKE)[0]) == pytest.approx(expected)
    assert float(adversarial.generator_loss("hinge", FAKE, None)[0]) == pytest.approx(-((-3.0 + 0.25) / 2 + 1.0) / 2)


def test_relativistic_by_hand():
    """Real minus fake is 3.5, 1.75 and -2, location by location."""
    softplus = lambda x: np.log1p(np.exp(x))  # noqa: E731
    d = ((softplus(-3.5) + softplus(-1.75)) / 2 + softplus(2.0)) / 2
    g = ((softplus(3.5) + softplus(1.75)) / 2 + softplus(-2.0)) / 2
    assert float(adversarial.discriminator_loss("relativistic", REAL, FAKE)[0]) == pytest.approx(d, rel=1e-6)
    assert float(adversarial.generator_loss("relativistic", FAKE, REAL)[0]) == pytest.approx(g, rel=1e-6)
    both = [maps + 7.0 for maps in FAKE], [maps + 7.0 for maps in REAL]  # nothing but the difference counts
    assert float(adversarial.generator_loss("relativistic", *both)[0]) == pytest.approx(g, rel=1e-6)


def _realness(params, x):
    """Of latents (N, 2, 2, 4) through tanh, and as one map (N, 1, 1) of logits."""
    return jnp.sum(jnp.tanh(x @ params["inner"]) @ params["outer"], axis=(1, 2))


def _params():
    rng = np.random.default_rng(1)
    return {"inner": rng.standard_normal((4, 5)), "outer": rng.standard_normal(5)}


def test_gradient_of_r1_by_finite_differences():
    with jax.enable_x64(True):
        params, x = _params(), np.random.default_rng(2).standard_normal((3, 2, 2, 4)).astype(np.float32)
        way = jax.tree.map(lambda p: np.random.default_rng(3).standard_normal(p.shape), params)
        gradient, _ = adversarial.r1(_realness, params, x, 0.5)
        at = lambda step: jax.tree.map(lambda p, w: p + step * w, params, way)  # noqa: E731
        penalty = lambda params: float(adversarial.r1(_realness, params, x, 0.5)[1].sum())  # noqa: E731
        slope = 0.5 * (penalty(at(1e-4)) - penalty(at(-1e-4))) / 2e-4
        found = sum(float((g * w).sum()) for g, w in zip(jax.tree.leaves(gradient), jax.tree.leaves(way), strict=True))
    assert found == pytest.approx(slope, rel=1e-4)


def test_differences_come_to_r1():
    """Their mean over the noise, sigma to zero; of 20,000 squared normals it is known to 1%."""
    params, x = _params(), np.random.default_rng(2).standard_normal((1, 2, 2, 4)).astype(np.float32)
    exact = float(adversarial.r1(_realness, params, x, 1.0)[1][0])
    near = jnp.repeat(jnp.asarray(x), 20_000, axis=0)
    drawn = jax.random.normal(jax.random.key(0), near.shape)
    maps = lambda x: [_realness(params, x)[:, None, None]]  # noqa: E731
    means = [float(adversarial.slopes(maps(near), maps(near + s * drawn), s).mean()) for s in (1.0, 1e-2)]
    assert means[1] == pytest.approx(exact, rel=0.04)
    assert abs(means[0] / exact - 1) > 0.1


def test_loss_is_a_mean_over_locations_then_heads():
    maps = [jnp.asarray([[[0.0, 2.0], [4.0, 6.0]]]), jnp.asarray([[[9.0]]])]
    assert float(adversarial.realness(maps)[0]) == pytest.approx((3.0 + 9.0) / 2)


def test_r1_of_a_quadratic_form():
    """realness = sum w x^2 / 2 has the gradient w x, whose squared norm is known."""
    x, w = RNG.standard_normal((3, 2, 2, 4)).astype(np.float32), RNG.standard_normal((2, 2, 4)).astype(np.float32)
    gradient, penalties = adversarial.r1(lambda w, x: jnp.sum(0.5 * w * x**2, axis=(1, 2, 3)), w, x, 0.3)
    np.testing.assert_allclose(penalties, ((w * x) ** 2).sum((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(gradient, 0.3 * 2 * w * (x**2).sum(0), rtol=1e-5)


def test_r1_is_the_gradient_of_the_penalty():
    """By backwards over backwards, where the slope depends on the parameters in every way."""
    x = RNG.standard_normal((3, 2, 2, 4)).astype(np.float32)
    params = {name: RNG.standard_normal(shape) for name, shape in (("inner", (4, 5)), ("outer", (5,)), ("free", (2,)))}

    def realness(params, x):
        return jnp.sum(jnp.tanh(x @ params["inner"]) @ params["outer"], axis=(1, 2)) + params["free"].sum()

    def penalties(params):
        return jnp.sum(jax.grad(lambda x: realness(params, x).sum())(x) ** 2, axis=(1, 2, 3))

    gradient, found = adversarial.r1(realness, params, x, 0.7)
    expected = jax.grad(lambda params: 0.7 * penalties(params).sum())(params)
    np.testing.assert_allclose(found, penalties(params), rtol=1e-5)
    jax.tree.map(lambda ours, other: np.testing.assert_allclose(ours, other, rtol=1e-5, atol=1e-6), gradient, expected)
    assert not np.any(gradient["free"])


def test_groups():
    x = jnp.arange(12).reshape(6, 2)
    assert adversarial.first_of_each_group(x, 2).tolist() == [[0, 1], [6, 7]]
    assert adversarial.roll_in_groups(x, 2)[:, 0].tolist() == [4, 0, 2, 10, 6, 8]


def _mixed(portion, captions=None, batch=4096, groups=8, **settings):
    """Latents, noise and texts whose value says where they came from; checks the masks of what was swapped."""
    index = jnp.arange(batch, dtype=jnp.float32).reshape(batch, 1, 1, 1)
    ids = jnp.arange(batch)[:, None] if captions is None else captions
    *out, swapped = adversarial.mix_and_match(
        jax.random.key(0), portion, groups, -1 - index, index, index, index[..., 0], ids, **settings
    )
    latents, noise, text = (np.asarray(x).reshape(batch) for x in out)
    own = np.arange(batch)
    np.testing.assert_array_equal(swapped["latents"], (latents >= 0) & (latents != own))
    np.testing.assert_array_equal(swapped["noise"], noise != own)
    np.testing.assert_array_equal(swapped["text"], text != own)
    return latents, noise, text


def test_mix_and_match_shares_and_kinds():
    latents, noise, text = _mixed(0.25)
    own = np.arange(4096)
    generated = latents < 0
    np.testing.assert_array_equal(latents[generated], -1 - own[generated])
    foreign_latents = ~generated & (latents != own)
    assert np.mean(foreign_latents) == pytest.approx(0.125, abs=0.02)
    assert np.mean(text != own) == pytest.approx(0.0625, abs=0.015)
    assert np.mean(noise != own) == pytest.approx(0.0625, abs=0.015)
    # Exactly one of the three is wrong in every replaced triple, and nothing leaves its group of 512.
    wrong = foreign_latents.astype(int) + (text != own) + (noise != own)
    np.testing.assert_array_equal(wrong, (~generated).astype(int))
    for swapped in (np.where(generated, own, latents), noise, text):
        np.testing.assert_array_equal(swapped // 512, own // 512)


def test_equal_captions_are_never_called_mismatched():
    latents, _, text = _mixed(1.0, captions=jnp.zeros((4096, 3), jnp.int32))
    np.testing.assert_array_equal(text, np.arange(4096))
    assert np.mean(latents < 0) == pytest.approx(0.25, abs=0.03)  # the share that would have swapped texts


def test_a_discriminator_that_sees_no_noise_is_told_of_no_wrong_noise():
    """There a real latent under a foreign noise, or a neighbour's under the same caption, is a real triple."""
    pairs = jnp.arange(4096)[:, None] // 2  # of two with the same caption the second has the first as its neighbour
    latents, noise, text = _mixed(1.0, captions=pairs, z_conditioning=False)
    own = np.arange(4096)
    np.testing.assert_array_equal(noise, own)
    real = latents >= 0
    assert not np.any(real & (latents // 2 == text // 2))
    assert np.mean(real) == pytest.approx(0.375, abs=0.03)


def test_portion_zero_changes_nothing():
    latents, noise, text = _mixed(0.0)
    own = np.arange(4096)
    np.testing.assert_array_equal(latents, -1 - own)
    np.testing.assert_array_equal(noise, own)
    np.testing.assert_array_equal(text, own)
