"""Folders of pairs on this machine or in a bucket: one kind of path for both, and what the two do differently.

`gs://...`, `s3://...` and `az://...` are read and written by fsspec with the package of that bucket (gcsfs, s3fs,
adlfs). An object appears whole when its upload ends: no renaming. (`etils.epath` would import TensorFlow for these
where it is installed, and can neither upload in one piece nor read a range in one request.)
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from d2g_jax.runtime.errors import UserError

_SCHEMES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}
"""Of addresses, and the package that each needs."""


@dataclasses.dataclass(frozen=True)
class BucketPath:
    """An object or a folder in a bucket: as much of `pathlib.Path` as pairs need, under the same names."""

    address: str  # gs://BUCKET/KEY

    def __truediv__(self, part: str | os.PathLike[str]) -> BucketPath:
        return BucketPath(f"{self.address.rstrip('/')}/{PurePosixPath(part)}")

    def __fspath__(self) -> str:
        return self.address

    def __str__(self) -> str:
        return self.address

    @property
    def name(self) -> str:
        return self.address.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> BucketPath:
        return BucketPath(self.address.rstrip("/").rpartition("/")[0])

    def with_name(self, name: str) -> BucketPath:
        return self.parent / name

    def exists(self) -> bool:
        return self._system.exists(self.address)

    def is_file(self) -> bool:
        return self._system.isfile(self.address)

    def is_dir(self) -> bool:
        return self._system.isdir(self.address)

    def open(self, mode: str) -> IO[bytes]:
        return self._system.open(self.address, mode)

    def read_bytes(self) -> bytes:
        return self._system.cat_file(self.address)

    def read_text(self, encoding: str) -> str:
        return self.read_bytes().decode(encoding)

    def read_range(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on, in one request."""
        return self._system.cat_file(self.address, start=offset, end=offset + count)

    def put(self, file: Path) -> None:
        """Uploads a local file in one piece: readers see all of it or nothing."""
        self._system.put_file(str(file), self.address)

    def size(self) -> int:
        return self._system.size(self.address)

    def glob(self, pattern: str) -> Iterator[BucketPath]:
        for found in self._system.glob(f"{self.address.rstrip('/')}/{pattern}"):
            yield self / PurePosixPath(found).name

    def iterdir(self) -> Iterator[BucketPath]:
        return self.glob("*")

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self._system.rm_file(self.address)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Nothing: a bucket has no folders."""

    @property
    def _system(self) -> Any:
        """fsspec's file system, one object per kind of bucket; it keeps no listings, for other workers change them."""
        import fsspec.core  # not needed for local folders

        try:
            return fsspec.core.url_to_fs(self.address, use_listings_cache=False)[0]
        except ImportError as error:
            package = _SCHEMES[self.address.partition("://")[0]]
            raise UserError(f"{self.address}: reading this bucket needs {package}; pip install {package}") from error


def as_path(text: str | os.PathLike[str]) -> Path | BucketPath:
    """A path, local or in a bucket. Raises `UserError` for another kind of address."""
    text = os.fspath(text)
    scheme, separator, _ = text.partition("://")
    if scheme in _SCHEMES and separator:
        return BucketPath(text)
    if separator:
        known = ", ".join(f"{name}://" for name in _SCHEMES)
        raise UserError(f"{text}: not a folder; give a local one or one that begins with {known}")
    return Path(text)


def is_local(path: Path | BucketPath) -> bool:
    """Whether a path of `as_path` is on this machine."""
    return isinstance(path, Path)


def size(path: Path | BucketPath) -> int:
    """Bytes of a file."""
    return path.size() if isinstance(path, BucketPath) else path.stat().st_size
