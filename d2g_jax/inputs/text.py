"""Text of other people: files in UTF-8, JSON in them, and prompts of one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from d2g_jax.runtime.errors import UserError

_POINTER = b"version https://git-lfs"
_BREAKS = re.compile(r"\r\n|\r|\n")


def read_text(file: Path, remedy: str) -> str:
    """A file in UTF-8, with or without a byte order mark. Raises `UserError` for any other, and for one of Git LFS."""
    try:
        content = file.read_bytes()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        wrong = "is missing" if missing else f"cannot be read ({error.strerror or error})"
        raise UserError(f"{file} {wrong}; {remedy}") from error
    check_fetched(file, content)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {error.start}; save it as UTF-8") from error


def check_fetched(file: Path, start: bytes) -> None:
    """Raises `UserError` where a file's first bytes are those of a Git LFS pointer."""
    if start.startswith(_POINTER):
        raise UserError(f"{file}: a Git LFS pointer, not the file itself; fetch that with `git lfs pull`")


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """A JSON object. Raises `UserError` as `read_text` does, and for anything else."""
    try:
        value = json.loads(read_text(file, remedy))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected a JSON object, not a {type(value).__name__}; {remedy}")
    return value


def lines(text: str) -> list[str]:
    """Lines as editors count them; other separators of Unicode, such as U+2028, end none."""
    found = _BREAKS.split(text)
    return found[:-1] if not found[-1] else found


def as_prompt(value: object, name: str) -> str:
    """A prompt of one line: breaks become spaces, which tokenizers do not tell from them.

    Raises `UserError` for what is no text, and as `check_whole` does.
    """
    if not isinstance(value, str):
        raise UserError(f"{name} holds {type(value).__name__}, no text; give text")
    check_whole(value, name)
    return " ".join(_BREAKS.split(value))


def check_whole(value: str, name: str) -> None:
    """Raises `UserError` for half a character: half an emoji in JSON, or bytes of a terminal that are not UTF-8."""
    if half := re.search("[\ud800-\udfff]", value):
        where = f"{half[0]!r} after {half.start()} characters"
        raise UserError(f"{name} holds half a character ({where}); write it again as UTF-8")


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sorts the numbers in names as numbers."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part)) if part.isdecimal() else (1, part.lower()) for part in parts]
