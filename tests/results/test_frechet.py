import numpy as np
import pytest

from d2g_jax.results import frechet
from d2g_jax.runtime.errors import UserError


def random_gaussian(rng, size):
    root = rng.standard_normal((size, size))
    return frechet.Gaussian(rng.standard_normal(size), root @ root.T)


def test_commuting_covariances_have_a_closed_form():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    a, b = rng.uniform(0.1, 4, (2, 5))
    mean = rng.standard_normal(5)
    first = frechet.Gaussian(mean, basis * a @ basis.T)
    second = frechet.Gaussian(np.zeros(5), basis * b @ basis.T)
    expected = mean @ mean + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert frechet.gaussian_distance(first, second) == pytest.approx(expected, rel=1e-12)


def test_general_covariances_agree_with_scipy():
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(1)
    a, b = random_gaussian(rng, 6), random_gaussian(rng, 6)
    cross = np.trace(sqrtm(a.covariance @ b.covariance)).real
    expected = np.square(a.mean - b.mean).sum() + np.trace(a.covariance + b.covariance) - 2 * cross
    assert frechet.gaussian_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet.gaussian_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_rank_deficient_covariance():
    a = frechet.Gaussian(np.zeros(3), np.diag([4.0, 0.0, 0.0]))
    b = frechet.Gaussian(np.zeros(3), np.diag([1.0, 1.0, 0.0]))
    assert frechet.gaussian_distance(a, b) == pytest.approx((2 - 1) ** 2 + 1)


def test_same_features_are_at_distance_zero_and_a_shift_is_its_square():
    x = np.random.default_rng(2).standard_normal((50, 4)).astype(np.float32)
    assert frechet.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet.frechet_distance(x, x + np.float32(3)) == pytest.approx(4 * 9, rel=1e-5)


def test_moments_are_numpys():
    x = np.random.default_rng(3).standard_normal((20, 3))
    fitted = frechet.fit(x)
    np.testing.assert_allclose(fitted.mean, x.mean(0))
    np.testing.assert_allclose(fitted.covariance, np.cov(x, rowvar=False))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((4, 4)), "4 samples of 4 features.*at least 5"),
        (np.zeros(4), "shape"),
        (np.full((5, 2), np.nan), "NaN"),
    ],
)
def test_unusable_features_are_named(features, message):
    with pytest.raises(UserError, match=f"teacher: .*{message}"):
        frechet.fit(features, source="teacher")


def test_features_of_two_networks_are_refused():
    rng = np.random.default_rng(4)
    with pytest.raises(UserError, match="same network"):
        frechet.gaussian_distance(random_gaussian(rng, 2), random_gaussian(rng, 3))
