import jax
import numpy as np
import pytest

from d2g_jax.digits import classifier, data, scores


@pytest.fixture(scope="module")
def digits():
    return data.load()


@pytest.fixture(scope="module")
def params():
    return classifier.load_classifier()


def test_shipped_classifier_knows_the_test_digits(digits, params):
    _, test = digits
    features, logits = classifier.features(params, test.images)
    assert features.shape == (360, classifier.FEATURES)
    assert features.dtype == np.float64
    assert (logits.argmax(1) == test.labels).mean() >= 0.985
    assert classifier.WEIGHTS_FILE.stat().st_size < 400_000


def test_features_do_not_depend_on_batch_or_form(digits, params):
    images = digits[1].images[:5]
    features, logits = classifier.features(params, images, batch=4)
    as_bytes = np.round((images / 2 + 0.5) * 255).astype(np.uint8)
    np.testing.assert_allclose(classifier.features(params, images, batch=8)[0], features, atol=1e-4)
    np.testing.assert_allclose(classifier.features(params, as_bytes, batch=8)[0], features, atol=0.3)
    assert logits.shape == (5, 10)
    assert classifier.features(params, images[:0])[0].shape == (0, classifier.FEATURES)


def test_a_short_training_learns_and_is_reproducible(digits):
    train, test = digits
    first, again = (classifier.train_classifier(train.images, train.labels, seed=1, steps=50) for _ in range(2))
    _, logits = classifier.features(first, test.images)
    assert (logits.argmax(1) == test.labels).mean() > 0.7
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))


def test_augmentation_moves_but_keeps_the_range(digits):
    ink = data.to_ink(digits[0].images[:64]).astype(np.float32)
    moved = np.asarray(jax.jit(classifier.augment)(ink, jax.random.key(0)))
    assert moved.min() >= 0
    assert moved.max() <= 1
    slant = data.slant_values(moved) - data.slant_values(ink)
    assert 0.05 < slant.std() < 0.25
    assert abs(moved.sum() / ink.sum() - 1) < 0.05


def test_save_and_load(tmp_path, params):
    classifier.save_classifier(params, tmp_path / "c.safetensors")
    back = classifier.load_classifier(tmp_path / "c.safetensors")
    assert jax.tree.all(jax.tree.map(np.array_equal, params, back))  # already rounded to fp16


def test_prompt_accuracy_of_real_images(digits, params):
    _, test = digits
    measured = data.attributes(test.images, test.labels)
    right = scores.prompt_accuracy(test.images, test.labels, measured.weight, measured.slant, params)
    assert right["weight"] == right["slant"] == 1
    assert right["digit"] == right["all"] >= 0.985
    wrong = scores.prompt_accuracy(
        test.images, (test.labels + 1) % 10, measured.weight, (measured.slant + 1) % 3, params
    )
    assert wrong["digit"] < 0.02
    assert wrong["all"] <= min(wrong["digit"], wrong["slant"])


def test_prompt_accuracy_needs_as_many_labels_as_images(digits, params):
    with pytest.raises(ValueError, match="2 images, 1"):
        scores.prompt_accuracy(digits[1].images[:2], [1], [1, 1], [1, 1], params)


def test_distance_grows_with_damage(digits, params):
    train, test = digits
    reference = classifier.features(params, train.images)[0]
    clean = scores.distance_to(test.images, reference, params)
    faded = scores.distance_to(data.to_images(0.6 * data.to_ink(test.images)), reference, params)
    collapsed = scores.distance_to(np.repeat(test.images[:36], 10, axis=0), reference, params)
    assert 0 < clean < 0.5 * faded
    assert clean < 0.5 * collapsed
