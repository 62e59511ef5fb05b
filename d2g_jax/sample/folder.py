"""A folder of drawn images: whose drawing it is, so that the same command goes on with it and another is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from d2g_jax.inputs.places import check_new_folder
from d2g_jax.inputs.text import read_json
from d2g_jax.models.network import Params
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.runtime import atomic
from d2g_jax.runtime.errors import UserError

DESCRIPTION = "drawing.json"
"""What a folder's images are; beside them."""

SAME_DRAWING = ("seed", "first_noise", "noise", "prompts_sha256", "size")
"""What of it two systems have in common whose images are compared one by one."""


def read_description(folder: Path) -> dict[str, Any] | None:
    """How the images of a folder were drawn; None where nothing says so. Raises `UserError` for a damaged file."""
    file = folder / DESCRIPTION
    if not file.is_file():
        return None
    described = read_json(file, remedy := "draw the images again into another folder")
    for key in SAME_DRAWING:
        if key not in described:
            raise UserError(f"{file}: {key} is missing; {remedy}")
    return described


def claim(folder: Path, described: Mapping[str, Any]) -> None:
    """Makes `folder` that of a drawing. Raises `UserError` as `check` does."""
    if check(folder, described):
        atomic.write_json(folder / DESCRIPTION, described)


def check(folder: Path, described: Mapping[str, Any]) -> bool:
    """Whether a drawing's folder is still to be made. Raises `UserError` for another drawing's and for other files."""
    there = read_description(folder)
    if there is None:
        check_new_folder(folder)
        return True
    for key, value in described.items():
        if there.get(key) != value:
            raise UserError(
                f"{folder / DESCRIPTION}: images of another drawing, {key}={there.get(key)!r}, not {value!r}; give "
                "another folder or remove this one"
            )
    return False


def prompts_digest(prompts: Iterable[str]) -> str:
    """SHA-256 of the images' prompts in order, one on a line: `sha256sum` of a text file that ends with a newline."""
    found = hashlib.sha256()
    for prompt in prompts:
        found.update(_line(prompt))
    return found.hexdigest()


def begins_with(prompts: Iterable[str], count: int, digest: str) -> bool:
    """Whether `digest` is `prompts_digest` of the first `count` of these prompts, or of more of them up to all."""
    found = hashlib.sha256()
    for number, prompt in enumerate(prompts, 1):
        found.update(_line(prompt))
        if number >= count and found.hexdigest() == digest:
            return True
    return False


def _line(prompt: str) -> bytes:
    return f"{prompt}\n".encode()


def worn_by(pipeline: Pipeline, lora: tuple[str, ...]) -> dict[str, Any]:
    """What LoRAs add to a description: their names, and the text towers, which may have changed; nothing without."""
    return {"lora": list(lora), "text_sha256": digest(pipeline.text_params)} if lora else {}


def digest(params: Params) -> str:
    """SHA-256 of all leaves in order with their names: the same whatever kind of file they came from."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        found.update(jax.tree_util.keystr(path).encode())
        found.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return found.hexdigest()
