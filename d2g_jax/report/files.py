"""JSON files of a workdir as a page may take them, and the pictures that they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from d2g_jax.runtime.errors import UserError

_DEEPEST = 100  # objects in objects; whoever walks them goes no deeper than Python's stack
_MOST_DIGITS = 300  # of a whole number; a longer one is no float


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None where there is no file; raises `UserError` for anything else."""
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text("utf-8"), parse_int=_whole)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); write it again or remove it") from error
    except RecursionError as error:
        raise _too_deep(path) from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds a {type(data).__name__}, expected a JSON object; write it again or remove it")
    if _is_deeper(data, _DEEPEST):
        raise _too_deep(path)
    return data


def inside(workdir: Path, relative: object) -> Path | None:
    """The file of that name, None where it is missing or outside of the workdir: a page shows its own run only."""
    if not isinstance(relative, str):
        return None
    try:
        path = (workdir / relative).resolve()
        return path if path.is_file() and path.is_relative_to(workdir.resolve()) else None
    except (OSError, ValueError):  # a name that no file can have, as one with a NUL: its file is missing
        return None


def _whole(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _too_deep(path: Path) -> UserError:
    return UserError(f"{path}: nested more than {_DEEPEST} deep; write it again or remove it")


def _is_deeper(value: object, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    parts = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(part, levels - 1) for part in parts)
