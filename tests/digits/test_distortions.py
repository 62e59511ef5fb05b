import numpy as np
import pytest

from d2g_jax.digits import classifier, data, distortions

NAMES = [function.__name__ for function, _ in distortions.KINDS]


@pytest.fixture(scope="module")
def ink():
    return data.to_ink(data.load()[0].images[:40])


@pytest.mark.parametrize("kind", range(len(NAMES)), ids=NAMES)
def test_strength_zero_is_nothing_and_more_is_further(kind, ink):
    distances = []
    for strength in (0.0, 0.2, 0.5, 1.0):
        rng = np.random.default_rng(0)
        distorted = np.stack([distortions.distort(one, kind, strength, rng) for one in ink])
        distances.append(np.sqrt(np.square(distorted - ink).mean()))
    assert distances[0] < 1e-12
    assert distances[1] > 0.01
    assert np.all(np.diff(distances) > 0.01)


def test_contrast_and_brightness_go_both_ways_and_are_not_clipped(ink):
    rng = np.random.default_rng(0)
    strong = np.stack([distortions.contrast(one, 1.0, rng) for one in ink])
    assert strong.max() == pytest.approx(1.5)
    assert (strong.max((1, 2)) < 0.9).any()
    moved = np.stack([distortions.brightness(one, 0.3, rng) for one in ink]).mean((1, 2)) - ink.mean((1, 2))
    np.testing.assert_allclose(np.unique(moved.round(6)), [-0.3, 0.3])


def test_restroke_changes_the_measured_weight(ink):
    rng = np.random.default_rng(0)
    change = [data.weight_values(distortions.restroke(one, 1.0, rng)[None])[0] for one in ink] - data.weight_values(ink)
    assert (change > 0.3).sum() > 10
    assert (change < -0.3).sum() > 10


def test_quantisation_keeps_coefficients_on_the_grid(ink):
    from scipy import fft

    constant = np.full((32, 32), 0.5)  # its only coefficient is 8 * 0.5 = 4 in each block
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(distortions.quantise(constant, 0.8, rng), 0.5)
    np.testing.assert_allclose(distortions.quantise(constant, 3.0, rng), 3 / 8)
    assert abs(fft.dctn(constant[:8, :8], norm="ortho")[0, 0] - 4) < 1e-12


def test_triplets_shapes_and_judgements():
    images = data.load()[0].images[:30]
    made = distortions.triplets(images, seed=0, n=300)
    for batch in made[:3]:
        assert batch.shape == (300, 32, 32, 3)
        assert batch.dtype == np.float32
    assert any(np.array_equal(made.reference[0], image) for image in images)
    assert 0.4 < made.judgement.mean() < 0.6
    certain = (made.judgement == 0) | (made.judgement == 1)
    assert 0.4 < certain.mean() < 0.6
    # 1 says that right is closer: where all are sure, mean square errors mostly agree.
    left, right = (np.square(batch - made.reference).mean((1, 2, 3)) for batch in (made.left, made.right))
    assert ((right < left) == (made.judgement == 1))[certain].mean() > 0.85


def test_triplets_are_a_function_of_their_seed():
    images = data.load()[0].images[:30]
    first, again, other = (distortions.triplets(images, seed=seed, n=8) for seed in (5, 5, 6))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first.left, other.left)


def test_strengths_are_on_one_scale(ink):
    params = classifier.load_classifier()
    before, labels = classifier.features(params, ink)[0], data.load()[0].labels[:40]
    pairs = [(i, j) for i in range(40) for j in range(i) if labels[i] == labels[j]]
    unit = np.mean([np.linalg.norm(before[i] - before[j]) for i, j in pairs])
    for kind, name in enumerate(NAMES):
        rng = np.random.default_rng(0)
        distorted = np.stack([distortions.distort(one, kind, 1.0, rng) for one in ink])
        change = np.linalg.norm(classifier.features(params, distorted)[0] - before, axis=1).mean() / unit
        assert (0.4 if name == "contrast" else 0.7) < change < 1.4, name
