"""Textures that hold over a whole picture, and scenes that show what their labels say."""

import numpy as np
import pytest

from d2g_jax.digits import scenes
from d2g_jax.digits.textures import KINDS, PERIOD, texture


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
def test_a_texture_is_two_tone_and_balanced(kind):
    drawn = np.stack([texture(kind, 64, np.random.default_rng(i)) for i in range(40)])
    assert drawn.dtype == np.float32
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert np.mean((drawn == 0) | (drawn == 1)) > 0.7  # the rest are edges
    assert drawn.mean() == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
def test_phase_and_direction_hold_across_the_picture(kind):
    """A corner of the picture comes again, nearly exactly, in the half of it that is farthest from the corner."""
    for seed in range(5):
        drawn = texture(kind, 64, np.random.default_rng(seed)) - 0.5
        corner = drawn[:12, :12]
        windows = np.lib.stride_tricks.sliding_window_view(drawn, (12, 12))[26:, 26:]
        match = np.tensordot(windows, corner, 2) / np.sqrt(np.square(windows).sum((2, 3)) * np.square(corner).sum())
        assert match.max() > 0.8


def test_the_period_is_within_its_limits():
    """Of stripes, by the strongest frequency."""
    for seed in range(8):
        drawn = texture(KINDS.index("stripes"), 64, np.random.default_rng(seed))
        spectrum = np.abs(np.fft.fft2(drawn - drawn.mean(), (256, 256)))
        y, x = np.unravel_index(np.argmax(spectrum[:, :128]), (256, 128))
        period = 1 / np.hypot(np.fft.fftfreq(256)[y], np.fft.fftfreq(256)[x])
        assert PERIOD[0] - 1 <= period <= PERIOD[1] + 1


def test_scenes_are_the_same_for_a_seed_whatever_their_number():
    many, few = scenes.render(6, 3), scenes.render(2, 3)
    np.testing.assert_array_equal(many.images[:2], few.images)
    np.testing.assert_array_equal(many.labels[:2], few.labels)
    assert (scenes.render(2, 4).images != few.images).any()


def test_a_plain_ground_is_one_colour_and_its_label_says_which():
    drawn = scenes.render(12, 0, plain=True)
    darks, lights = (np.asarray(list(c.values())) for c in (scenes.DARKS, scenes.LIGHTS))
    sides = set()
    for image, row in zip(drawn.images, drawn.labels, strict=True):
        scene = scenes.Scene(*row)
        assert scene.texture == scenes.UNCLEAR
        assert (scene.dark == scenes.UNCLEAR) != (scene.light == scenes.UNCLEAR)
        ground = lights[scene.light] if scene.dark == scenes.UNCLEAR else darks[scene.dark]
        np.testing.assert_allclose(image[[0, 0, -1, -1], [0, -1, 0, -1]] / 255, np.tile(ground, (4, 1)), atol=0.003)
        sides.add(scene.dark == scenes.UNCLEAR)
    assert sides == {True, False}


def test_the_colours_are_those_of_the_labels():
    drawn = scenes.render(60, 0)
    inks, darks, lights = (np.asarray(list(c.values())) for c in (scenes.INKS, scenes.DARKS, scenes.LIGHTS))
    for image, row in zip(drawn.images, drawn.labels, strict=True):
        scene = scenes.Scene(*row)
        pixels = image.reshape(-1, 3) / 255
        for colour in (inks[scene.ink], darks[scene.dark], lights[scene.light]):
            assert np.mean(np.abs(pixels - colour).max(1) < 0.02) > 0.02
    for place, name in enumerate(scenes.PARTS):
        found = drawn.labels[:, place]
        assert found.max() < scenes.PARTS[name]
        assert found.min() >= (scenes.UNCLEAR if name in ("weight", "slant") else 0)


def test_scenes_of_the_test_set_show_digits_that_training_never_does():
    train, test = scenes.glyphs(), scenes.glyphs(test=True)
    assert (len(train.ink), len(test.ink)) == (1437, 360)
    flat = {ink.tobytes() for ink in train.ink}
    assert not any(ink.tobytes() in flat for ink in test.ink)
    assert train.ink.shape[1:] == (scenes.GLYPH, scenes.GLYPH)
    assert np.bincount(test.labels[:, 0]).min() > 20
