"""The words of a tokenizer that knows few: those of an embedded world, whose captions hold no others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

MOST_TOKENS, FEWEST_WORDS = 2_000, 10
"""Of a tokenizer whose words are listed: CLIP's own, of 49,408 tokens, spells whatever it has no token for."""


def known_words(tokenizer: Any) -> tuple[str, ...]:
    """The words of letters that a small tokenizer has a token for, sorted; none of a large one."""
    if len(tokenizer) > MOST_TOKENS:
        return ()
    whole = {token.removesuffix("</w>") for token in tokenizer.get_vocab() if token.endswith("</w>")}
    words = sorted(word for word in whole if len(word) > 1 and word.isascii() and word.isalpha())
    return tuple(words) if len(words) >= FEWEST_WORDS else ()


def unknown_words(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """The words of `prompts`, lower-cased and once each, that are none of `known_words`; [] where there are none."""
    if not (known := known_words(tokenizer)):
        return []
    found = (word for prompt in prompts for word in re.findall("[^\\W\\d_]{2,}", prompt.lower()))
    return list(dict.fromkeys(word for word in found if word not in known))
