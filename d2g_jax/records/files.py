"""Files with their checksums, and JSON files that are read strictly into frozen dataclasses."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import google_crc32c

from d2g_jax.runtime import atomic
from d2g_jax.runtime.errors import UserError

T = TypeVar("T")


def write_atomic(path: Path, parts: Iterable[bytes]) -> tuple[int, int]:
    """Writes `parts` one after another to `path`, whole or not at all; returns the file's size and its CRC32C.

    Raises `UserError` when the disk is full or the folder is read-only.
    """
    size = crc = 0
    with atomic.replacing(path) as temporary, temporary.open("wb") as file:
        for part in parts:
            file.write(part)
            size += len(part)
            crc = google_crc32c.extend(crc, part)
    return size, crc


def write_json(path: Path, value: Any) -> None:
    """A dataclass as a JSON file, atomically; the same value gives the same bytes."""
    atomic.write_text(path, json.dumps(dataclasses.asdict(value), indent=2, sort_keys=True) + "\n")


def read_json(path: Path, cls: type[T]) -> T:
    """A dataclass from its JSON file. Raises `UserError` when a field is unknown, missing or of another type."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read as JSON ({str(error).splitlines()[0]}); restore or remove it"
        ) from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds {type(data).__name__}, expected an object")
    hints = typing.get_type_hints(cls)
    if unknown := sorted(data.keys() - hints.keys()):
        raise UserError(f"{path}: unknown key {unknown[0]!r}; it was written by another version or edited")
    if missing := sorted(hints.keys() - data.keys()):
        raise UserError(f"{path}: key {missing[0]!r} is missing; it was written by another version or edited")
    return cls(**{name: _typed(path, name, data[name], hint) for name, hint in hints.items()})


def _typed(path: Path, name: str, value: Any, hint: Any) -> Any:
    """`value` of a JSON file as the type `hint`: a plain type, `X | None`, `tuple[int, ...]` or `dict[...]`."""
    if isinstance(hint, types.UnionType):
        return None if value is None else _typed(path, name, value, typing.get_args(hint)[0])
    origin = typing.get_origin(hint) or hint
    if origin is tuple and isinstance(value, list):
        kinds = typing.get_args(hint)
        if len(kinds) == len(value) and all(type(item) is kind for item, kind in zip(value, kinds, strict=True)):
            return tuple(value)
    elif origin is float and type(value) in (int, float):
        return float(value)
    elif type(value) is origin:
        return value
    raise UserError(f"{path}: {name} = {value!r} is no {getattr(hint, '__name__', hint)}")
