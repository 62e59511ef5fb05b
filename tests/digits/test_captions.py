"""Captions say what a scene shows, in words that are one token each."""

import itertools
import re

import numpy as np
import pytest

from d2g_jax.digits import captions, scenes, tokenizer
from d2g_jax.digits.scenes import UNCLEAR, Scene
from d2g_jax.digits.textures import KINDS
from d2g_jax.pipeline.tokenizers import load_tokenizer, tokenize

SCENE = Scene(digit=7, weight=2, slant=0, ink=1, texture=3, dark=2, light=1)


@pytest.mark.parametrize("numeral", [False, True])
@pytest.mark.parametrize("phrasing", range(captions.PHRASINGS))
def test_every_phrasing_names_every_part(phrasing, numeral):
    text = captions.caption(SCENE, phrasing, numeral)
    for word in ("7" if numeral else "seven", "bold", "slanted to the left", "green", "bricks", "brown", "yellow"):
        assert word in text
    unclear = captions.caption(SCENE._replace(weight=UNCLEAR, slant=UNCLEAR), phrasing, numeral)
    assert not re.search("bold|slanted|  |, ,", unclear)


@pytest.mark.parametrize("phrasing", range(captions.PHRASINGS))
def test_a_plain_ground_has_the_one_colour_that_is_named(phrasing):
    text = captions.caption(SCENE._replace(texture=UNCLEAR, dark=UNCLEAR), phrasing)
    assert "plain yellow" in text
    assert not re.search("brown|bricks|and|  ", text)


def test_random_captions_are_true_and_leave_something_out_at_times():
    rng = np.random.default_rng(0)
    texts = [captions.random_caption(rng, SCENE) for _ in range(200)]
    assert all("green" in text and "bricks" in text for text in texts)
    assert not any(word in text for text in texts for word in ("thin", "upright", "right", "red", "sky"))
    assert 0.8 < np.mean(["bold" in text for text in texts]) < 1


def test_evaluation_prompts_name_everything_and_are_clear():
    prompts = captions.evaluation_prompts(300, 1)
    assert prompts == captions.evaluation_prompts(300, 1)
    assert all(UNCLEAR not in prompt.scene for prompt in prompts)
    assert {prompt.scene.texture for prompt in prompts} == set(range(scenes.PARTS["texture"]))
    assert len({prompt.prompt for prompt in prompts}) > 290


def test_prompts_of_some_grounds_alone():
    prompts = captions.evaluation_prompts(200, 1, ("dots", captions.PLAIN))
    assert {prompt.scene.texture for prompt in prompts} == {KINDS.index("dots"), UNCLEAR}
    assert all(("plain" in p.prompt) == (p.scene.texture == UNCLEAR) == (UNCLEAR in p.scene) for p in prompts)


def test_every_word_is_one_token_and_every_caption_fits(tmp_path):
    words = captions.words()
    tokenizer.write_tokenizer(tmp_path)
    tokens = load_tokenizer(tmp_path)
    plain = SCENE._replace(texture=UNCLEAR, light=UNCLEAR)
    for weight, slant, phrasing, scene in itertools.product(
        (UNCLEAR, 0, 1, 2), (UNCLEAR, 0, 1, 2), range(captions.PHRASINGS), (SCENE, plain)
    ):
        text = captions.caption(scene._replace(weight=weight, slant=slant), phrasing)
        pieces = re.findall("[a-z]+|[0-9]|,", text)
        assert set(re.findall("[a-z]+", text)) <= set(words)
        (ids,) = tokenize(tokens, [text])
        end = tokens.eos_token_id
        assert int(np.argmax(ids == end)) == len(pieces) + 1  # the start token, and one for each word
