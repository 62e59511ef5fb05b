"""Whole files or none: a reader sees the old file, or none, or the new one, never half of it."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from d2g_jax.runtime import buckets
from d2g_jax.runtime.errors import UserError

TEMPORARY = ".tmp"  # ends the name of every file that is not whole yet


@contextmanager
def writing(path: str | Path | buckets.BucketPath) -> Iterator[None]:
    """A full disk or a read-only folder as a `UserError` that names `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be written ({reason}); free space or choose a writable folder") from error


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path in the folder of `path`; on leaving, flushes that file to disk and renames it once.

    Makes the parent folders. When the body raises, the temporary file is removed; a killed process leaves it behind
    under a name that nothing reads. The file gets the mode that `open` gives, whoever wrote it. Raises `UserError`
    when the disk is full or the folder is read-only. What goes to a bucket is written locally and uploaded once.
    """
    path = buckets.as_path(path)
    if not buckets.is_local(path):
        with _uploading(path) as temporary:
            yield temporary
        return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # safetensors makes files that only their owner may read
            _sync(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(path.parent)  # a rename is durable only when its folder is flushed too


@contextmanager
def _uploading(path: buckets.BucketPath) -> Iterator[Path]:
    with writing(path), tempfile.TemporaryDirectory() as scratch:
        temporary = Path(scratch, path.name)
        temporary.touch()
        yield temporary
        path.put(temporary)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes `content` to `path`, whole or not at all; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` to `path` as UTF-8, whole or not at all; see `replacing`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any, **options: Any) -> None:
    """Writes `value` to `path` as JSON, whole or not at all; `options` are those of `json.dumps`."""
    write_text(path, json.dumps(value, **{"indent": 2, **options}) + "\n")


def write_array(path: str | Path, array: np.ndarray) -> None:
    """Writes `array` to `path` as .npy, whole or not at all; see `replacing`."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
