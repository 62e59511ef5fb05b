import numpy as np
import pytest

from d2g_jax.digits import captions, data


def test_captions_say_what_they_are_given():
    assert captions.caption(7, 2, 0, 0) == "a bold handwritten seven slanted to the left"
    assert captions.caption(7, 0, 1, 1) == "the digit 7, thin strokes, upright"
    assert captions.caption(3, 0, None, 2) == "thin 3"
    assert captions.caption(8, None, None, 3) == "an eight"
    assert captions.caption(1, None, None, 3) == "a one"
    assert captions.caption(4, 1, None, 3) == "a four with regular strokes"
    assert captions.caption(5, None, 2, 4) == "the handwritten number five, right slanted"


def test_distinct_labels_give_distinct_captions():
    texts = captions.all_captions()
    assert len(texts) == 10 * 4 * 4 * captions.PHRASINGS
    # One phrasing pair coincides: a bare numeral (phrasings 2 and 5) and "bold 3".
    for phrasing in range(captions.PHRASINGS):
        one_phrasing = texts[phrasing :: captions.PHRASINGS]
        assert len(set(one_phrasing)) == len(one_phrasing)


def test_unknown_phrasing_is_refused():
    with pytest.raises(ValueError, match="phrasing 6"):
        captions.caption(0, None, None, captions.PHRASINGS)


def test_unclear_attributes_are_never_mentioned():
    clear = np.array([True, False] * 300)
    zeros = np.zeros(600, int)
    measured = data.Attributes(zeros, zeros, zeros, zeros, clear, ~clear)  # thin, slanted to the left
    texts = captions.random_captions(np.random.default_rng(0), zeros, measured)
    thin = ["thin" in text for text in texts]
    left = ["left" in text for text in texts]
    assert not any(thin[1::2])
    assert not any(left[0::2])
    assert 0.8 < np.mean(thin[0::2]) < 1  # mention = 0.9
    assert 0.8 < np.mean(left[1::2]) < 1


def test_evaluation_prompts_follow_the_training_distribution():
    prompts = captions.evaluation_prompts(data.TRAIN_IMAGES, seed=3)
    train, _ = data.load()
    measured = data.attributes(train.images, train.labels)
    real = sorted(zip(train.labels.tolist(), measured.weight.tolist(), measured.slant.tolist(), strict=True))
    assert sorted(prompt[1:] for prompt in prompts) == real
    variants = {captions.caption(*prompts[0][1:], phrasing) for phrasing in range(captions.PHRASINGS)}
    assert prompts[0].prompt in variants


def test_evaluation_prompts_are_a_function_of_their_seed():
    first = captions.evaluation_prompts(2000, seed=1)
    assert len(first) == 2000
    assert captions.evaluation_prompts(2000, seed=1) == first
    assert captions.evaluation_prompts(2000, seed=2) != first
    assert captions.evaluation_prompts(0, seed=1) == []
