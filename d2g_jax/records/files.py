"""Files with their checksums, and JSON files that are read strictly into frozen dataclasses."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import google_crc32c

from d2g_jax.inputs import text
from d2g_jax.inputs.fields import check_kinds
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
    atomic.write_json(path, dataclasses.asdict(value), sort_keys=True)


def read_json(path: Path, cls: type[T]) -> T:
    """A dataclass from its JSON file. Raises `UserError` when a field is unknown, missing or of another type."""
    data = text.read_json(path, "restore or remove it")
    hints = typing.get_type_hints(cls)
    if unknown := sorted(data.keys() - hints.keys()):
        raise UserError(f"{path}: unknown key {unknown[0]!r}; it was written by another version or edited")
    if missing := sorted(hints.keys() - data.keys()):
        raise UserError(f"{path}: key {missing[0]!r} is missing; it was written by another version or edited")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    check_kinds(cls, values, path)
    return cls(**values)
