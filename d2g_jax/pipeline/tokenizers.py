"""The CLIP tokenizers of pipelines: read, made of what is shipped, used and written."""

from __future__ import annotations

import functools
import gzip
import json
import os
import re
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d2g_jax.inputs import text
from d2g_jax.inputs.numbers import Range
from d2g_jax.models import clip
from d2g_jax.pipeline.original_keys import KINDS
from d2g_jax.pipeline.words import unknown_words
from d2g_jax.runtime.errors import UserError

_MARKS = re.compile(r"<(lora|lyco|hypernet):|\([^()]+:\d*\.\d+\)")  # "<lora:a:1>" and "(red:1.3)" of A1111, ComfyUI
_NAMED, _SHOWN = 10, 80  # unknown words in a warning, characters of a text
_AT_ONCE = 10_000  # prompts tokenized to see which are too long
_IMPORT = threading.Lock()  # transformers' names appear when first asked for, and not to two threads at once


def read_component(file: Path) -> dict[str, Any]:
    """A JSON object of a pipeline folder, whose class is a name; see `text.read_json`."""
    value = text.read_json(file, "expected a diffusers pipeline folder")
    if not isinstance(name := value.get("_class_name", ""), str):
        raise UserError(f"{file}: _class_name = {name!r}; give text")
    return value


def load_tokenizer(folder: Path, text_config: clip.ClipTextConfig | None = None) -> Any:
    """transformers' `CLIPTokenizer` of a folder; `UserError` without merges or when it does not fit the text tower."""
    for file in folder.glob("[!.]*.json"):
        read_component(file)
    _check_merges(folder)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises torch, which nothing here uses
    with _IMPORT:
        from transformers import CLIPTokenizer  # 1.5 s to import, and no torch

    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the parser is Rust's, and raises plain Exception
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{folder}: transformers cannot read this tokenizer ({reason}); fetch it again") from error
    if tokenizer.pad_token_id is None:
        raise UserError(f"{folder / 'tokenizer_config.json'}: pad_token is no token; give one such as <|endoftext|>")
    if text_config is not None:
        positions = Range(1, text_config.max_position_embeddings, whole=True)
        positions.check(f"{folder / 'tokenizer_config.json'}: model_max_length", tokenizer.model_max_length)
        if len(tokenizer) > text_config.vocab_size:
            raise UserError(
                f"{folder}: {len(tokenizer)} tokens, but the text tower's vocab_size is {text_config.vocab_size}"
            )
    return tokenizer


def words_of(tokenizer: Any) -> dict[str, Any]:
    """What `tokenizer_files` makes a tokenizer of, with nothing of CLIP's own words."""
    model, words = json.loads(tokenizer.backend_tokenizer.to_str())["model"], {}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if merges != _clip_merges():
        words["merges"] = merges
    if (vocab := tokenizer.get_vocab()) != vocabulary(merges):
        words["vocab"] = dict(sorted(vocab.items(), key=lambda item: item[1]))
    return {"pad_token": tokenizer.pad_token, "model_max_length": tokenizer.model_max_length, **words}


def vocabulary(merges: Iterable[str]) -> dict[str, int]:
    """CLIP's tokens and their numbers for merges such as `"i n</w>"`.

    They are bytes, bytes that end a word, what is merged, and both ends. The byte alphabet is GPT-2's: printable bytes
    are themselves, the others the characters from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]
    ends = [f"{letter}</w>" for letter in letters]
    tokens = [*letters, *ends, *(pair.replace(" ", "") for pair in merges), "<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}


@functools.cache
def _clip_merges() -> list[str]:
    return gzip.decompress((KINDS / "clip_merges.txt.gz").read_bytes()).decode().splitlines()


_TOKENIZING = threading.Lock()
"""A tokenizer keeps the padding of the call under way in itself, and the pair job tokenizes in two threads."""


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> np.ndarray:
    """Prompts as int32 (N, L) with L = `model_max_length`, padded or cut off: see `warn_of`."""
    length = tokenizer.model_max_length
    if not prompts:
        return np.zeros((0, length), np.int32)
    with _TOKENIZING:
        fitted = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True)["input_ids"]
    return np.asarray(fitted, np.int32)


def warn_of(tokenizer: Any, prompts: Sequence[str]) -> None:
    """Warns, a line each, of what is cut off as too long, of marks of other programs and of words never seen.

    Once for all prompts of a job, which may be millions: those that may be too long are looked at a few at a time.
    """
    length = tokenizer.model_max_length
    # a token is a letter at least, and two are the ends; letters of other scripts may become several when normalised
    suspects = [prompt for prompt in prompts if len(prompt) > length - 2 or not prompt.isascii()]
    count, first = 0, None
    for start in range(0, len(suspects), _AT_ONCE):
        part = suspects[start : start + _AT_ONCE]
        with _TOKENIZING:
            # not verbose: its warning of indexing errors is not true of prompts that are cut off
            whole = tokenizer(part, verbose=False)["input_ids"]
        cut = [(prompt, ids) for prompt, ids in zip(part, whole, strict=True) if len(ids) > length]
        count, first = count + len(cut), first or next(iter(cut), None)
    if first:
        prompt, lost = first[0], tokenizer.decode(first[1][length - 1 : -1])
        several = f"{count} of {len(prompts)} prompts are" if len(prompts) > 1 else "prompt"
        warnings.warn(f"{several} longer than {length} tokens, cut off {_short(lost)}: {_short(prompt)}", stacklevel=2)
    if marked := [prompt for prompt in prompts if _MARKS.search(prompt)]:
        taken = f"weights and LoRAs that other programs read in a prompt are words here: {_short(marked[0])}"
        warnings.warn(f"{taken}; --lora=FILE puts a LoRA on the model", stacklevel=2)
    if unknown := unknown_words(tokenizer, prompts):
        more = f" and {len(unknown) - _NAMED} others" if len(unknown) > _NAMED else ""
        warnings.warn(f"words that this model has never seen: {', '.join(unknown[:_NAMED])}{more}", stacklevel=2)


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def tokenizer_files(
    vocab: Mapping[str, int] | None = None,
    merges: Sequence[str] | None = None,
    model_max_length: int = 77,
    pad_token: str = "<|endoftext|>",
) -> dict[str, bytes]:
    """The files of a CLIP tokenizer folder, whose defaults are CLIP's own; `merges`, `vocab`: see `vocabulary`."""
    merges = _clip_merges() if merges is None else merges
    vocab = vocabulary(merges) if vocab is None else vocab
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": pad_token}
    special["unk_token"] = "<|endoftext|>"
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": model_max_length,
        "do_lower_case": True,
        **special,
    }
    return {
        "vocab.json": json_bytes(vocab),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
        "special_tokens_map.json": json_bytes(special),
        "tokenizer_config.json": json_bytes(config),
    }


def _check_merges(folder: Path) -> None:
    if (folder / "tokenizer.json").is_file():
        merges = read_component(folder / "tokenizer.json").get("model", {}).get("merges")
    elif not (folder / "vocab.json").is_file():
        raise UserError(f"{folder / 'vocab.json'} is missing; a CLIP tokenizer needs vocab.json and merges.txt")
    elif not (folder / "merges.txt").is_file():
        raise UserError(f"{folder / 'merges.txt'} is missing; a CLIP tokenizer needs vocab.json and merges.txt")
    else:
        lines = text.lines(text.read_text(folder / "merges.txt", "fetch the tokenizer again"))
        merges = [line for line in lines if line.strip() and not line.startswith("#version")]
    if not merges:
        raise UserError(f"{folder}: the tokenizer has no merges, it would spell every word; fetch merges.txt again")


def json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
