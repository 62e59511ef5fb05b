"""Folders of pairs on this machine or in a bucket: one kind of path for both, and what the two do differently.

A local path is a `pathlib.Path`. `gs://...`, `s3://...` and `az://...` are `etils.epath.Path`s, which fsspec serves
with the package of that bucket (gcsfs, s3fs, adlfs). An object appears whole when its upload ends: no renaming.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from d2g_jax.errors import UserError

_SCHEMES = ("gs://", "s3://", "az://")


def as_path(text: str | os.PathLike[str]) -> Any:
    """A path: `pathlib.Path`, or `etils.epath.Path` for a bucket. Raises `UserError` for another kind of address."""
    text = os.fspath(text)
    if text.startswith(_SCHEMES):
        from etils import epath  # not needed for local folders

        return epath.Path(text)
    if "://" in text:
        raise UserError(f"{text}: not a folder; give a local one or one that begins with {', '.join(_SCHEMES)}")
    return Path(text)


def is_local(path: Any) -> bool:
    """Whether a path of `as_path` is on this machine."""
    return isinstance(path, Path)


def size(path: Any) -> int:
    """Bytes of a file."""
    return path.stat().st_size if is_local(path) else path.stat().length


def put(file: Path, path: Any) -> None:
    """Uploads a local file to a bucket in one piece: readers see all of it or nothing."""
    system, name = _system(path)
    system.put_file(str(file), name)


def read_range(path: Any, offset: int, count: int) -> bytes:
    """`count` bytes of an object from `offset` on, in one request."""
    system, name = _system(path)
    return system.cat_file(name, start=offset, end=offset + count)


def _system(path: Any) -> tuple[Any, str]:
    import fsspec.core

    return fsspec.core.url_to_fs(os.fspath(path))
