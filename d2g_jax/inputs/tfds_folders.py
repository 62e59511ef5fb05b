"""Folders that TFDS prepared, by its own reader of their metadata; TensorFlow is not imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from d2g_jax.runtime.errors import UserError


def dataset_info(folder: Path, remedy: str) -> Any:
    """The `tfds.core.DatasetInfo` of a folder.

    Raises `UserError`, which ends with `remedy`, where TFDS cannot read it.
    """
    import tensorflow_datasets as tfds  # a second of import that other sources do not need
    from google.protobuf.json_format import ParseError

    try:
        info = tfds.builder_from_directory(folder).info
        for split in info.splits.values():
            split.filepaths  # noqa: B018 (they are made of what the file says, which may be wrong)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, ParseError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: not a folder that TFDS prepared ({reason}); {remedy}") from error
    return info
