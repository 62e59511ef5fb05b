"""Latent augmentation: closed-form fixtures, presets, sharing of draws, gradients, robustness."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erfinv

from d2g_jax.losses import augment
from d2g_jax.losses.augment import Transform
from d2g_jax.runtime.errors import UserError

apply = jax.jit(augment.apply, static_argnames="stream")
draw = jax.jit(augment.draw, static_argnames=("preset", "n"))


def full(value, *shape):
    return jnp.full(shape or (2,), value, jnp.float32)


def quantiles(u):
    """Every random variable of preset bg at its quantile u, as the released code's deterministic mode has it."""
    bell = erfinv(2 * u - 1)
    return Transform(
        flip=full(np.floor(2 * u)),
        quarter_turns=full(np.floor(4 * u)),
        integer_shift=full((2 * u - 1) * 0.125, 2, 2),
        scale=full(2 ** (0.2 * bell)),
        pre_rotation=full((2 * u - 1) * np.pi),
        stretch=full(2 ** (0.2 * bell)),
        post_rotation=full(0.0),
        fractional_shift=full(0.125 * bell, 2, 2),
    )


def wave(amplitude, frequency, phase):
    values = amplitude * np.sin(frequency * np.arange(2 * 4 * 32 * 32) + phase)
    return values.reshape(2, 4, 32, 32).transpose(0, 2, 3, 1).astype(np.float32)


# mean s, std s, mean t, std t, s[0,0,0,0], s[0,1,10,20], t[1,3,31,31], t[0,2,16,5] with indices in NCHW
FIXTURES = {
    0.30: (0.000898, 0.557873, -0.000961, 0.294507, 0.723123, -0.750625, 0.256431, -0.097686),
    0.60: (-0.002837, 0.557681, -0.001390, 0.329626, 0.257198, 0.522772, 0.220639, -0.028369),
}


@pytest.mark.parametrize("u", FIXTURES)
def test_closed_form_fixtures(u):
    s, t = (np.asarray(apply(quantiles(u), wave(*w))) for w in ((0.8, 0.37, 0.5), (0.6, 0.11, 1.0)))
    got = s.mean(), s.std(), t.mean(), t.std(), s[0, 0, 0, 0], s[0, 10, 20, 1], t[1, 31, 31, 3], t[0, 16, 5, 2]
    np.testing.assert_allclose(got, FIXTURES[u], atol=2e-4, rtol=0)


def smooth(height=16, width=16):
    y, x = np.mgrid[:height, :width]
    channels = [
        np.sin(2 * np.pi * (a * x / width + b * y / height) + c) for a, b, c in ((1, 0, 0), (1, 1, 1), (0, 1, 2))
    ]
    return np.stack(channels, -1)[None].astype(np.float32)


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (Transform(flip=full(1.0, 1)), lambda x: x[:, :, ::-1]),
        (Transform(quarter_turns=full(1.0, 1)), lambda x: np.rot90(x, 1, (1, 2))),
        (Transform(integer_shift=jnp.array([[0.125, -0.0625]])), lambda x: np.roll(x, (2, -1), (2, 1))),
        (Transform(fractional_shift=jnp.array([[0.125, 0.0]])), lambda x: np.roll(x, 2, 2)),
        (Transform(pre_rotation=full(np.pi, 1)), lambda x: x[:, ::-1, ::-1]),
        (Transform(scale=full(1.0, 1)), lambda x: x),
    ],
    ids=("flip", "quarter_turn", "integer_shift", "fractional_shift", "half_turn", "identity"),
)
def test_geometry_moves_pixels_where_it_should(transform, expected):
    x = smooth()
    got = np.asarray(apply(transform, x))[:, 3:-3, 3:-3]
    # sym6 is not quite symmetric: a half turn moves the picture by a tenth of a pixel
    np.testing.assert_allclose(got, expected(x)[:, 3:-3, 3:-3], atol=0.1)


def test_color_and_cutout_formulas():
    x = np.random.default_rng(0).normal(size=(2, 8, 6, 4)).astype(np.float32)
    color = Transform(
        brightness=jnp.array([0.1, -0.2]), contrast=jnp.array([0.5, 1.5]), saturation=jnp.array([2.0, 0.0])
    )
    want = x + np.array([0.1, -0.2], np.float32)[:, None, None, None]
    mean = want.mean((1, 2, 3), keepdims=True)
    want = (want - mean) * np.array([0.5, 1.5], np.float32)[:, None, None, None] + mean
    mean = want.mean(3, keepdims=True)
    want = (want - mean) * np.array([2.0, 0.0], np.float32)[:, None, None, None] + mean
    np.testing.assert_allclose(apply(color, x), want, atol=1e-6)

    cut = np.asarray(apply(Transform(cutout_center=jnp.array([[0.5, 0.5], [0.0, 1.0]])), x))
    want = x.copy()
    want[0, 2:6, 2:4] = 0  # pixel centres closer than a quarter of the size; x first in the centre
    want[1, 6:, :1] = 0
    np.testing.assert_array_equal(cut[0], want[0])
    np.testing.assert_array_equal(cut[1, :, 2:], want[1, :, 2:])
    assert (cut[1, 6:, 0] == 0).all()
    assert (cut[1, :6] == x[1, :6]).all()


@pytest.mark.parametrize("preset", augment.PRESETS)
def test_presets_draw_their_own_fields(preset):
    families = {
        "b": ("flip", "quarter_turns", "integer_shift"),
        "g": ("scale", "pre_rotation", "stretch", "post_rotation", "fractional_shift"),
        "c": ("brightness", "contrast", "saturation"),
        "o": ("cutout_center",),
        "n": ("noise_scale", "noise_key"),
    }
    transform = jax.eval_shape(lambda key: augment.draw(key, preset, 3), jax.random.key(0))
    drawn = {f.name for f in dataclasses.fields(transform) if getattr(transform, f.name) is not None}
    letters = "" if preset == "none" else preset
    assert drawn == {name for letter in letters for name in families[letter]}
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(transform))


def test_draws_have_the_stated_distributions():
    n = 4000
    t = draw(jax.random.key(1), "bgcon", n)
    assert set(np.unique(t.flip)) == {0, 1}
    assert set(np.unique(t.quarter_turns)) == {0, 1, 2, 3}
    bounds = {
        "integer_shift": (-0.125, 0.125),
        "pre_rotation": (-np.pi, np.pi),
        "post_rotation": (-np.pi, np.pi),
        "brightness": (-0.5, 0.5),
        "contrast": (0.5, 1.5),
        "saturation": (0, 2),
        "cutout_center": (0, 1),
    }
    for name, (low, high) in bounds.items():
        values = np.asarray(getattr(t, name))
        assert low <= values.min() < low + 0.01 * (high - low), name
        assert high - 0.01 * (high - low) < values.max() <= high, name
        assert abs(values.mean() - (low + high) / 2) < 0.03 * (high - low), name
    for values, std in ((np.log2(t.scale), 0.2), (np.log2(t.stretch), 0.2), (t.fractional_shift, 0.125)):
        assert abs(np.mean(values)) < 0.1 * std
        assert abs(np.std(values) / std - 1) < 0.1
    assert abs(np.mean(np.square(t.noise_scale)) - 0.01) < 0.002
    assert not np.array_equal(t.pre_rotation, t.post_rotation)


def test_a_sample_depends_on_its_key_alone():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 8, 8, 4)), jnp.float32)
    whole = apply(draw(jax.random.key(2), "bgcon", 4), x)
    half, every = draw(jax.random.key(2), "bgcon", 2), draw(jax.random.key(2), "bgcon", 4)
    assert all((a == b[:2]).all() for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(every), strict=True))
    again = apply(draw(jax.random.key(2), "bgcon", 4), x)
    assert (again == whole).all()
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(2), i))(jnp.arange(4))
    flipped = apply(draw(keys[::-1], "bgcon", 4), x[::-1])
    np.testing.assert_allclose(flipped[::-1], whole, atol=1e-6)
    assert not np.allclose(whole, apply(draw(jax.random.key(3), "bgcon", 4), x), atol=0.1)


def test_inputs_share_everything_but_noise():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(4, 8, 8, 4)), jnp.float32)
    noisy = draw(jax.random.key(4), "n", 4)
    quiet = dataclasses.replace(draw(jax.random.key(4), "bgcon", 4), noise_scale=None, noise_key=None)
    assert (apply(quiet, x, stream=0) == apply(quiet, x, stream=1)).all()
    noise = apply(noisy, x, stream=0) - x, apply(noisy, x, stream=1) - x
    assert not np.allclose(*noise)
    ratio = np.std(noise[0], (1, 2, 3)) / noisy.noise_scale
    np.testing.assert_allclose(ratio, 1, atol=0.2)


def test_gradients_by_finite_differences():
    transform = draw(jax.random.key(5), "bgcon", 4)
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        x, direction, weights = (jnp.asarray(rng.normal(size=(4, 8, 8, 4))) for _ in range(3))
        f = jax.jit(lambda x: (weights * augment.apply(transform, x) ** 2).sum())
        slope = np.vdot(jax.jit(jax.grad(f))(x), direction)
        numeric = (f(x + 1e-5 * direction) - f(x - 1e-5 * direction)) / 2e-5
        np.testing.assert_allclose(slope, numeric, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_constants_and_bf16_give_no_nan(dtype):
    transform = draw(jax.random.key(6), "bgcon", 4)

    @jax.jit
    def pull(x):
        y, transpose = jax.vjp(lambda x: augment.apply(transform, x), x)
        return y, transpose(jnp.ones_like(y))[0]

    for value in (0.0, 1.0):
        for result in pull(jnp.full((4, 8, 8, 4), value, dtype)):
            assert result.dtype == dtype
            assert jnp.isfinite(result.astype(jnp.float32)).all()


def test_far_away_samples_are_zero():
    x = jnp.ones((1, 8, 8, 1))
    away = Transform(fractional_shift=jnp.array([[1e6, -1e6]]))
    assert (apply(away, x) == 0).all()


def test_gradients_reach_the_latents_only():
    x = jnp.asarray(smooth(8, 8))
    transform = draw(jax.random.key(7), "bgco", 1)
    gradient = jax.jit(jax.grad(lambda t: augment.apply(t, x).sum()))(transform)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


def test_unknown_preset():
    with pytest.raises(UserError, match="'bx' is unknown; choose one of none, b, g"):
        augment.draw(jax.random.key(0), "bx", 1)
