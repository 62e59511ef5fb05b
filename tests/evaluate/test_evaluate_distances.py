"""Distances of features against sums written out, and against public implementations where they are installed."""

import numpy as np
import pytest

from d2g_jax.evaluate import distances
from d2g_jax.runtime.errors import UserError


def features(seed, count, shift=0.0, size=6):
    return (np.random.default_rng(seed).normal(size=(count, size)) + shift).astype(np.float32)


def around(generated, real, k):
    return distances.neighbourly(generated, real, [k])[k]


def both(generated, real, k):
    found = around(generated, real, k)
    return found["precision"], found["recall"]


def test_kid_of_whole_sets_is_the_unbiased_estimate_written_out():
    a, b = features(0, 7), features(1, 7, 0.5)
    kernel = lambda x, y: (float(x @ y) / 6 + 1) ** 3  # noqa: E731
    pairs = [(i, j) for i in range(7) for j in range(7)]
    within = sum(kernel(s[i], s[j]) for s in (a, b) for i, j in pairs if i != j) / (7 * 6)
    across = sum(kernel(a[i], b[j]) for i, j in pairs) / 49
    mean, deviation = distances.kernel_distance(a, b, subsets=3, size=7, seed=0)
    assert mean == pytest.approx(within - 2 * across, rel=1e-5)
    assert deviation < 1e-6


def test_kid_is_about_zero_for_one_distribution_and_grows_with_the_shift():
    values = [
        distances.kernel_distance(features(2, 400), features(3, 400, shift), subsets=20, size=100, seed=0)[0]
        for shift in (0.0, 0.5, 1.0)
    ]
    assert abs(values[0]) < 0.1 < values[1] < values[2]


def test_kid_subsets_are_those_of_the_seed():
    a, b = features(4, 90), features(5, 90)
    one, again, other = (distances.kernel_distance(a, b, subsets=4, size=30, seed=s) for s in (1, 1, 2))
    assert one == again != other


def test_kid_of_too_few():
    with pytest.raises(UserError, match=r"subsets of 100.*90 and 120"):
        distances.kernel_distance(features(0, 90), features(1, 120), subsets=1, size=100, seed=0)


def test_precision_and_recall_written_out(monkeypatch):
    monkeypatch.setattr(distances, "_ROWS", 16)  # several blocks
    a, b, k = features(6, 50), features(7, 40, 0.8), 3

    def covered(points, centres):
        hit = 0
        radii = [sorted(np.linalg.norm(c - centres, axis=1))[k] for c in centres]
        for point in points:
            hit += any(np.linalg.norm(point - c) <= radius for c, radius in zip(centres, radii, strict=True))
        return hit / len(points)

    precision, recall = both(a, b, k)
    assert (precision, recall) == (covered(a, b), covered(b, a))
    assert 0 < precision < 1
    assert 0 < recall < 1


def test_precision_and_recall_at_their_ends():
    a = features(8, 30)
    assert both(a, a, 3) == (1.0, 1.0)
    assert both(a, a + 100, 3) == (0.0, 0.0)
    few = np.concatenate([a[:1]] * 30)  # one image over and over: precise, and of no variety
    precision, recall = both(few, a, 3)
    assert precision == 1.0
    assert recall == pytest.approx(1 / 30)


def test_precision_and_recall_of_too_few():
    with pytest.raises(UserError, match="3-th neighbour"):
        around(features(0, 3), features(1, 10), 3)


def test_equal_to_torch_fidelity():
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchvision", exc_type=ImportError)
    kid = pytest.importorskip("torch_fidelity.metric_kid", exc_type=ImportError)
    prc = pytest.importorskip("torch_fidelity.metric_prc", exc_type=ImportError)
    a, b = features(9, 300, size=20), features(10, 250, 0.3, size=20)
    theirs = kid.kid_features_to_metric(
        torch.from_numpy(a), torch.from_numpy(b), kid_subsets=10, kid_subset_size=100, rng_seed=3,
        kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1, verbose=False,
    )  # fmt: skip
    ours = distances.kernel_distance(a, b, subsets=10, size=100, seed=3)
    np.testing.assert_allclose(ours, list(theirs.values()), rtol=1e-4)
    expected = prc.calculate_precision_recall_full(torch.from_numpy(a), torch.from_numpy(b), 3)
    np.testing.assert_allclose(both(a, b, 3), expected, atol=1e-6)


def test_density_and_coverage_written_out(monkeypatch):
    monkeypatch.setattr(distances, "_ROWS", 16)  # several blocks
    generated, real, k = features(6, 50), features(7, 40, 0.8), 5
    radii = [sorted(np.linalg.norm(r - real, axis=1))[k] for r in real]
    inside = np.array(
        [[np.linalg.norm(g - r) < radius for r, radius in zip(real, radii, strict=True)] for g in generated]
    )
    found = distances.neighbourly(generated, real, [3, k])
    assert found[3] == around(generated, real, 3) != found[k]  # one pass for both
    assert found[k]["density"] == pytest.approx(inside.sum() / (k * 50))
    assert found[k]["coverage"] == inside.any(0).mean()
    assert 0 < inside.any(0).mean() < 1
    few = np.concatenate([generated[:1]] * 30)  # of no variety: the density of its place, nearly no coverage
    assert around(few, real, k)["coverage"] == inside[0].mean()


def test_equal_to_prdc():
    prdc = pytest.importorskip("prdc")
    generated, real = features(9, 300, 0.3, size=20), features(10, 250, size=20)
    assert around(generated, real, 5) == pytest.approx(prdc.compute_prdc(real, generated, 5), rel=1e-4)
    # of equal sets 1, but for a neighbour that makes a ball and is rounded into it; with all of them it were 1.2
    assert around(real, real.copy(), 5) == pytest.approx(prdc.compute_prdc(real, real, 5), abs=0.01)
    assert prdc.compute_prdc(real, real, 5)["density"] == 1


def unit(seed, count, shift=0.0):
    x = features(seed, count, shift)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_clip_mmd_written_out_and_of_equal_sets(monkeypatch):
    monkeypatch.setattr(distances, "_ROWS", 16)
    a, b = unit(0, 30), unit(1, 40, 0.5)
    mean = lambda x, y: np.mean([np.exp(-np.sum((p - q) ** 2) / (2 * 10**2)) for p in x for q in y])  # noqa: E731
    assert distances.clip_mmd(a, b) == pytest.approx(1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b)), rel=1e-4)
    assert abs(distances.clip_mmd(a, a)) < 1e-9
    assert distances.clip_mmd(a, b) > 0.1


def test_equal_to_clip_mmd():
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("clip_mmd.calculation", exc_type=ImportError)
    a, b = unit(0, 128), unit(1, 128, 0.5)
    found = float(theirs.mmd_efficient(torch.from_numpy(a), torch.from_numpy(b)))
    assert distances.clip_mmd(a, b) == pytest.approx(found, rel=1e-4)
