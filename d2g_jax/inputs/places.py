"""Places that others name: local paths to read from, files and folders to write into."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

from d2g_jax.runtime.errors import UserError

_LONGEST = 255  # bytes of a name in the file systems that there are
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def local_path(text: str | os.PathLike[str]) -> Path:
    """A path on this machine; a leading `~` is the home, also behind an equals sign, where no shell sees it.

    Raises `UserError` for no text, for an address or an unknown home, which would become a folder of that name, and for
    what no file system lets one ask for: a text too long for a name, folders of other users.
    """
    text = os.fspath(text)
    if not text.strip():
        raise UserError("an empty path, as a variable that is not set leaves it; give a path, . for this folder")
    if _ADDRESS.match(text):
        raise UserError(f"{text}: an address, and only a path on this machine serves here; copy or mount it")
    path = expanded(text)
    if text.startswith("~") and str(path).startswith("~"):
        raise UserError(f"{text}: nobody knows this home; give the whole path, or ./~NAME for a folder called so")
    try:
        if any(len(os.fsencode(part)) > _LONGEST for part in path.parts):  # below a new folder too
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # ValueError: a NUL
        hint = "; a prompt itself goes to --prompt" if " " in text else ""
        raise UserError(f"{shown(text)}: {getattr(error, 'strerror', error)}; give another path{hint}") from error
    return path


def shown(text: str) -> str:
    """`text`, or the start of what is too long for a path: a prompt in the wrong place, most often."""
    return text if len(text) <= _LONGEST else f"{text[:60]}..."


def expanded(text: str | os.PathLike[str]) -> Path:
    """`text` with a leading `~` replaced; as it is where nobody knows the home, and `./~` is no home."""
    path = Path(text)
    try:
        return path.expanduser() if os.fspath(text).startswith("~") else path
    except RuntimeError:
        return path


def cache_folder() -> Path | None:
    """Of compiled programs and plans: JAX_COMPILATION_CACHE_DIR, else ~/.cache/d2g_jax; None without a home."""
    if given := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(given)
    home = expanded("~")
    return None if home == Path("~") else home / ".cache" / "d2g_jax"


def is_there(path: str | os.PathLike[str]) -> bool:
    """Whether a file or folder is there; a text too long for a name, or with a NUL, is none."""
    return os.path.exists(path)


def check_output(file: Path, like: str) -> None:
    """Raises `UserError`, before long work, when --out=`file` could not be written; `like` is a name for a file."""
    if file.is_dir():
        raise UserError(f"--out={file}: is a folder; give a file, {file / like}")
    _check_writable(file.absolute().parent, file)


def check_new_folder(folder: Path) -> None:
    """Raises `UserError`, before long work, unless `folder` is empty or can be made."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: holds other files; give a new place or empty it")
    _check_writable(folder.absolute(), folder)


def check_room(folder: Path, size: int, what: str) -> None:
    """Raises `UserError`, before long work, where a disk has less than `size` bytes free for `what` alone."""
    if size > (free := shutil.disk_usage(_nearest(folder.absolute())).free):
        raise UserError(f"{folder}: {what} take {size / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free; ask for less")


def _check_writable(folder: Path, asked: Path) -> None:
    there = _nearest(folder)
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{asked}: {there} cannot be written; choose another folder")


def _nearest(path: Path) -> Path:
    """`path` or the first folder above it that is there."""
    return next(place for place in (path, *path.parents) if place.exists())
