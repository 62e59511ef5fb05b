"""The words of a tokenizer that knows few: those of an embedded world, whose captions hold no others."""

from __future__ import annotations

import re
import unicodedata
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
    """The words of `prompts`, lower-cased and once each, that are none of `known_words`; [] where there are none.

    One letter of the Latin alphabet is a token of its own, and no word.
    """
    if not (known := known_words(tokenizer)):
        return []
    texts = (unicodedata.normalize("NFC", prompt).lower() for prompt in prompts)
    found = (word for text in texts for word in re.findall(r"[^\W\d_]{2,}|[^\W\d_a-z]", text))
    return list(dict.fromkeys(word for word in found if word not in known))
