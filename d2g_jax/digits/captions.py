"""Captions that say what an image really shows: the digit, and if clear the weight of its strokes and its slant."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from d2g_jax.digits import data

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

PHRASINGS = 6
"""How many ways `caption` knows of saying the same thing."""

_LEANING = ("slanted to the left", "upright", "slanted to the right")
_STROKES = ("thin strokes", "regular strokes", "bold strokes")
_SLANTED = ("left slanted", "upright", "right slanted")


class Prompt(NamedTuple):
    """A prompt with the labels it was built from: nothing ever parses a caption."""

    prompt: str
    digit: int
    weight: int  # index into data.WEIGHTS
    slant: int  # index into data.SLANTS


def caption(digit: int, weight: int | None, slant: int | None, phrasing: int) -> str:
    """The caption of `digit` (0..9) in one of `PHRASINGS` phrasings; an attribute that is None is not mentioned.

    `weight` and `slant` are indices into `data.WEIGHTS` and `data.SLANTS`.
    """
    word, numeral = NUMBER_WORDS[digit], str(digit)
    bold = "" if weight is None else data.WEIGHTS[weight]
    strokes = "" if weight is None else _STROKES[weight]
    leaning = "" if slant is None else _LEANING[slant]
    slanted = "" if slant is None else _SLANTED[slant]
    match phrasing:
        case 0:
            return _with_article(_words(bold, "handwritten", word, leaning))
        case 1:
            return _commas(f"the digit {numeral}", strokes, leaning)
        case 2:
            return _words(bold, numeral, leaning)
        case 3:
            return _with_article(_words(slanted, word, "with" if strokes else "", strokes))
        case 4:
            return _commas(f"the handwritten number {word}", slanted, bold)
        case 5:
            return _words(slanted, bold, numeral)
        case _:
            raise ValueError(f"phrasing {phrasing} is not one of 0..{PHRASINGS - 1}")


def random_caption(
    rng: np.random.Generator, digit: int, weight: int | None, slant: int | None, mention: float = 0.9
) -> str:
    """A caption in a random phrasing that mentions each attribute that is not None with probability `mention`."""
    phrasing, keep = int(rng.integers(PHRASINGS)), rng.random(2) < mention
    return caption(digit, weight if keep[0] else None, slant if keep[1] else None, phrasing)


def random_captions(
    rng: np.random.Generator, digits: np.ndarray, measured: data.Attributes, mention: float = 0.9
) -> list[str]:
    """One true random caption per image: an attribute in its dead band is never mentioned."""
    weights = [
        int(index) if clear else None for index, clear in zip(measured.weight, measured.weight_clear, strict=True)
    ]
    slants = [int(index) if clear else None for index, clear in zip(measured.slant, measured.slant_clear, strict=True)]
    return [
        random_caption(rng, int(digit), weight, slant, mention)
        for digit, weight, slant in zip(digits, weights, slants, strict=True)
    ]


def evaluation_prompts(n: int, seed: int) -> list[Prompt]:
    """`n` prompts that name the digit and both attributes.

    The labels are those of the real training images in random order (again from the start when `n` exceeds their
    number), so that samples and real images may be compared by a Frechet distance.
    """
    rng = np.random.default_rng(seed)
    digits, weights, slants = _training_labels()
    rounds = -(-n // len(digits))
    order = np.concatenate([rng.permutation(len(digits)) for _ in range(rounds)])[:n] if n else np.zeros(0, int)
    phrasings = rng.integers(PHRASINGS, size=n)
    labels = [(int(digits[i]), int(weights[i]), int(slants[i])) for i in order]
    return [Prompt(caption(*label, int(phrasing)), *label) for label, phrasing in zip(labels, phrasings, strict=True)]


def all_captions() -> list[str]:
    """Every caption there is, with and without attributes."""
    choices = (None, 0, 1, 2)
    return [
        caption(digit, weight, slant, phrasing)
        for digit in range(10)
        for weight in choices
        for slant in choices
        for phrasing in range(PHRASINGS)
    ]


@functools.cache
def _training_labels() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    train, _ = data.load()
    measured = data.attributes(train.images, train.labels)
    return train.labels, measured.weight, measured.slant


def _words(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _commas(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' and not phrase.startswith('one') else 'a'} {phrase}"
