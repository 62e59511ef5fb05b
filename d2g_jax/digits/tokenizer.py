"""A CLIP tokenizer of its own for the digits: byte-level BPE whose merges make each caption word one token.

CLIP's byte-pair encoding (Radford et al. 2021; the byte alphabet is GPT-2's): text is lower-cased, split into words,
letter runs and single numerals, and each word's last symbol carries `</w>`.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from d2g_jax.digits import captions
from d2g_jax.pipeline import tokenizers
from d2g_jax.runtime import atomic

MODEL_MAX_LENGTH = 20
"""Tokens of a caption, its two ends included."""

WORD_END = "</w>"


def bpe(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """The symbols of one `word` of printable ASCII after merging by rank."""
    symbols = [*word[:-1], word[-1] + WORD_END]
    while len(symbols) > 1:
        pairs = list(itertools.pairwise(symbols))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        at = pairs.index(best)
        symbols[at : at + 2] = ["".join(best)]
    return symbols


def merges_for(words: list[str]) -> list[tuple[str, str]]:
    """Merges that turn each word into one token.

    Words are taken in turn; what the merges so far leave of a word is joined from the left. A later merge has a lower
    priority than every earlier one, so it cannot undo a word that is already whole.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        symbols = bpe(word, ranks)
        while len(symbols) > 1:
            ranks[(symbols[0], symbols[1])] = len(ranks)
            symbols = bpe(word, ranks)
    return list(ranks)


def tokenizer_files() -> dict[str, bytes]:
    """Those of a tokenizer folder by name.

    The end token has the highest id, so pooling at the highest id and pooling at the end token are the same.
    """
    merges = [" ".join(pair) for pair in merges_for(captions.words())]
    return tokenizers.tokenizer_files(merges=merges, model_max_length=MODEL_MAX_LENGTH)


def write_tokenizer(folder: str | Path) -> None:
    """Writes `tokenizer_files` into `folder`, which is made if it is missing."""
    for name, content in tokenizer_files().items():
        atomic.write_bytes(Path(folder) / name, content)
