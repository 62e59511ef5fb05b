"""Captions that say what a scene shows, in one of several phrasings; what is unclear is never mentioned."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from d2g_jax.digits import data
from d2g_jax.digits.data import UNCLEAR
from d2g_jax.digits.scenes import DARKS, INKS, LIGHTS, PARTS, Scene, glyphs
from d2g_jax.digits.textures import KINDS

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SLANTS = ("slanted to the left", "upright", "slanted to the right")
PHRASINGS = 4
"""How many ways `caption` knows of saying the same thing; each with the digit as a word or as a numeral."""

PLAIN = "plain"
"""In place of a texture's name: a ground of one colour."""


class Prompt(NamedTuple):
    """A prompt with the labels it was built from: nothing ever parses a caption."""

    prompt: str
    scene: Scene


def caption(scene: Scene, phrasing: int, numeral: bool = False) -> str:
    """What `scene` shows; a weight or slant that is `UNCLEAR` is left out. A ground without texture is plain."""
    digit = str(scene.digit) if numeral else NUMBER_WORDS[scene.digit]
    bold = "" if scene.weight == UNCLEAR else data.WEIGHTS[scene.weight]
    slanted = "" if scene.slant == UNCLEAR else SLANTS[scene.slant]
    ink, ground = list(INKS)[scene.ink], _ground(scene, phrasing)
    match phrasing:
        case 0:
            return f"a {_words(bold, ink, digit, slanted)} on {ground}"
        case 1:
            return f"{_words(bold, ink, 'digit', digit, slanted)}, {ground}"
        case 2:
            return f"{ground} behind a {_words(bold, ink, digit, slanted)}"
        case 3:
            return f"a {_words(ink, digit, slanted)} in {bold or 'handwritten'} strokes on {ground}"
        case _:
            raise ValueError(f"phrasing {phrasing} is not one of 0..{PHRASINGS - 1}")


def _ground(scene: Scene, phrasing: int) -> str:
    """What is behind the digit: a texture in two colours, or the one colour that is named."""
    dark, light = ("" if i == UNCLEAR else list(c)[i] for c, i in ((DARKS, scene.dark), (LIGHTS, scene.light)))
    if scene.texture == UNCLEAR:
        return f"{PLAIN} {dark}{light}"
    kind = KINDS[scene.texture]
    return (
        f"{dark} and {light} {kind}",
        f"{kind} in {light} and {dark}",
        f"{kind} of {dark} and {light}",
        f"{light} and {dark} {kind}",
    )[phrasing % PHRASINGS]


def random_caption(rng: np.random.Generator, scene: Scene, mention: float = 0.9) -> str:
    """A true caption in a random phrasing that mentions weight and slant each with probability `mention`."""
    weight, slant = (
        label if keep else UNCLEAR
        for label, keep in zip((scene.weight, scene.slant), rng.random(2) < mention, strict=True)
    )
    shown = scene._replace(weight=weight, slant=slant)
    return caption(shown, int(rng.integers(PHRASINGS)), bool(rng.random() < 0.5))


def evaluation_prompts(count: int, seed: int, grounds: Sequence[str] = KINDS) -> list[Prompt]:
    """`count` prompts that name everything; digits, weights and slants as often together as where both are clear.

    `grounds`: of `KINDS`, or `PLAIN`; each is as frequent as another.
    """
    rng = np.random.default_rng(seed)
    kinds = [UNCLEAR if ground == PLAIN else KINDS.index(ground) for ground in grounds]
    clear = glyphs().labels[(glyphs().labels != UNCLEAR).all(axis=1)]
    prompts = []
    for row in rng.integers(len(clear), size=count):
        ink, kind, dark, light = rng.integers([len(INKS), len(kinds), len(DARKS), len(LIGHTS)])
        if kinds[kind] == UNCLEAR:
            dark, light = (UNCLEAR, light) if rng.random() < 0.5 else (dark, UNCLEAR)
        scene = Scene(*map(int, (*clear[row], ink, kinds[kind], dark, light)))
        prompts.append(Prompt(caption(scene, int(rng.integers(PHRASINGS)), bool(rng.random() < 0.5)), scene))
    return prompts


def words() -> list[str]:
    """Every word of letters that a caption can hold, sorted."""
    found: set[str] = {PLAIN}
    for i, phrasing in itertools.product(range(max(PARTS.values())), range(PHRASINGS)):
        scene = Scene(*(i % count for count in PARTS.values()))
        for shown in (scene, scene._replace(weight=UNCLEAR)):
            found |= set(re.findall("[a-z]+", caption(shown, phrasing)))
    return sorted(found)


def _words(*parts: str) -> str:
    return " ".join(part for part in parts if part)
