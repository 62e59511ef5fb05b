"""Arrays of other people: .npy files, and whether they hold floating-point numbers."""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np

from d2g_jax.runtime.errors import UserError

DAMAGED = (
    OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, RuntimeError, SyntaxError, zipfile.BadZipFile,
    zlib.error, struct.error, MemoryError, OverflowError, tokenize.TokenError,
)  # fmt: skip
"""What numpy raises for a .npy or .npz where a byte is not as it was written; it evaluates headers as Python."""


def read_array(file: str | Path, form: str) -> np.ndarray:
    """The array of a .npy file; `form` says in messages what it should be.

    Raises `UserError` for a file that is missing, empty, of Python objects, or no .npy (an .npz among others).
    """
    try:
        with open(file, "rb") as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)
    except DAMAGED as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UserError(f"{file}: cannot be read as .npy ({reason}); give {form}") from error


def check_floats(array: np.ndarray, name: object, form: str) -> None:
    """Raises `UserError` unless an array holds floating-point numbers; numpy's files do not know bfloat16."""
    if array.dtype.kind == "V" and array.dtype.name != "bfloat16":
        raise UserError(f"{name}: holds {array.dtype}, as numpy stores bfloat16; save it as float32, {form}")
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise UserError(f"{name}: holds {array.dtype}; give {form}")
