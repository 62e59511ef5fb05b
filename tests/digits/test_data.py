import numpy as np
import pytest

from d2g_jax.digits import data


def stroke(width=4.0, shear=0.0, length=20, brightness=1.0, offset=0.0):
    """Ink (1, 32, 32): an antialiased vertical bar, sheared so that its top goes to the right for shear > 0."""
    y, x = np.mgrid[:32, :32] - 15.5
    distance = np.abs(x - offset + shear * y)
    return (np.clip(width / 2 - distance + 0.5, 0, 1) * (np.abs(y) < length / 2) * brightness)[None]


@pytest.fixture(scope="module")
def digits():
    return data.load()


def test_split_is_a_partition_of_the_source(digits):
    from sklearn.datasets import load_digits

    images = np.concatenate([part.ink for part in digits])
    labels = np.concatenate([part.labels for part in digits])
    source = load_digits().images / 16
    assert [part.ink.shape for part in digits] == [(1437, 8, 8), (360, 8, 8)]

    def as_set(images, labels):
        return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))

    assert as_set(images, labels) == as_set(source, load_digits().target)
    assert all((np.bincount(part.labels) > len(part.labels) / 15).all() for part in digits)


def test_enlarging_keeps_flat_ink_and_its_centre():
    corner = np.zeros((1, 8, 8))
    corner[0, 2:6, 2:6] = 1
    large = data.enlarge(corner)
    assert np.allclose(large, large[:, ::-1])
    assert large[0, 15, 15] >= 1
    assert data.enlarge(corner, 50).shape == (1, 50, 50)
    assert np.allclose(data.cubic_matrix(10, 32).sum(1)[5:-5], 1)  # away from the border, weights sum to one


def test_slant_is_the_shear_and_positive_to_the_right():
    for shear in (-0.3, 0.0, 0.3):
        assert data.slant_values(stroke(shear=shear))[0] == pytest.approx(shear, abs=0.01)
    assert data.slant_values(stroke(shear=0.2)[:, :, ::-1])[0] == pytest.approx(-0.2, abs=0.01)
    assert data.slant_values(stroke(shear=0.2, offset=3))[0] == pytest.approx(0.2, abs=0.01)


def test_weight_is_ink_per_length_whatever_the_length():
    # A long bar's ends hardly count: 2 w L b^2 / (2 (L + w) b), ink floor included through b.
    for width in (4.0, 6.0):
        for length in (16, 24):
            expected = width * length / (length + width)
            assert data.weight_values(stroke(width, length=length))[0] == pytest.approx(expected, rel=0.06)
    assert data.weight_values(stroke(brightness=0.55))[0] == pytest.approx(
        0.5 * data.weight_values(stroke(brightness=1.0))[0], rel=0.03
    )


def test_haze_below_the_floor_is_paper():
    clean = stroke(shear=0.2)
    hazy = np.maximum(clean, 0.09)
    assert data.weight_values(hazy) == pytest.approx(data.weight_values(clean))
    assert data.slant_values(hazy) == pytest.approx(data.slant_values(clean))


def test_blank_images_measure_zero():
    blank = np.zeros((2, 32, 32))
    assert data.weight_values(blank).tolist() == [0, 0]
    assert data.slant_values(blank).tolist() == [0, 0]


def measured(digits):
    """Of weight and of slant the values (N,) and the classes by the plain thresholds."""
    ink = data._measured_ink(digits)
    both = (data.weight_values(ink), data.WEIGHT_THRESHOLDS), (data.slant_values(ink), data.SLANT_THRESHOLDS)
    return [(values, data._classify(values, thresholds[digits.labels])[0]) for values, thresholds in both]


def test_thresholds_are_those_of_the_training_set(digits):
    tables = data.WEIGHT_THRESHOLDS, data.SLANT_THRESHOLDS
    for (values, _), thresholds in zip(measured(digits[0]), tables, strict=True):
        quartiles = [np.quantile(values[digits[0].labels == digit], [0.25, 0.75]) for digit in range(10)]
        np.testing.assert_allclose(thresholds, quartiles, atol=1.5e-4)


def test_classes_are_balanced_within_each_digit_of_the_training_set(digits):
    for _, index in measured(digits[0]):
        for digit in range(10):
            share = np.bincount(index[digits[0].labels == digit], minlength=3) / (digits[0].labels == digit).sum()
            np.testing.assert_allclose(share, [0.25, 0.5, 0.25], atol=0.02)


def test_thicker_and_more_slanted_digits_change_class(digits):
    from scipy import ndimage

    ink, labels = digits[0].ink[:200], digits[0].labels[:200]
    thicker = ndimage.grey_dilation(ink, size=(1, 2, 2))
    assert (measured(data.Digits(thicker, labels))[0][1] == 2).mean() > 0.95
    sheared = np.stack([ndimage.affine_transform(one, [[1, 0], [0.5, 1]], [0, -1.75], order=1) for one in ink])
    assert (measured(data.Digits(sheared, labels))[1][1] == 2).mean() > 0.95


def test_clear_means_outside_the_dead_bands():
    low, high = data.WEIGHT_THRESHOLDS[3]
    margin = data.CLEAR_MARGIN * (high - low)
    value = np.array(
        [low - 1.01 * margin, low - 0.99 * margin, low + 0.99 * margin, (low + high) / 2, high + 0.99 * margin]
    )
    index, clear = data._classify(value, np.repeat([[low, high]], len(value), 0))
    assert index.tolist() == [0, 0, 1, 1, 2]
    assert clear.tolist() == [True, False, False, True, False]
