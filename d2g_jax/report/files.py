"""JSON files of a workdir as a page may take them, and the pictures that they name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from d2g_jax.inputs.text import read_json
from d2g_jax.runtime.errors import UserError

_REMEDY = "write it again or remove it"


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None where there is no file; raises `UserError` for anything else."""
    return read_json(path, _REMEDY) if path.is_file() else None


def read_formed(path: Path, form: dict[str, Any], workdir: Path) -> dict[str, Any] | None:
    """What `form` names of the JSON object in a file, None where there is no file.

    A form is a dict of forms by key, a list of one form for all entries, a tuple of one for what may be missing (then
    None), `Path` for a picture's name (see `inside`), or a function of the value, such as `int`.

    Raises `UserError` for a file of another form.
    """
    data = read_object(path)
    try:
        return None if data is None else _formed(data, form, workdir)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: not of its form ({type(error).__name__}: {error}); {_REMEDY}") from error


def _formed(value: Any, form: Any, workdir: Path) -> Any:
    if isinstance(form, dict):
        if not isinstance(value, dict):
            raise TypeError(f"a {type(value).__name__} in place of an object")
        given = {name: value.get(name) if isinstance(part, tuple) else value[name] for name, part in form.items()}
        return {name: _formed(given[name], part, workdir) for name, part in form.items()}
    if isinstance(form, list):
        if not isinstance(value, list):
            raise TypeError(f"a {type(value).__name__} in place of a list")
        return [_formed(one, form[0], workdir) for one in value]
    if isinstance(form, tuple):
        return None if value is None else _formed(value, form[0], workdir)
    return inside(workdir, value) if form is Path else form(value)


def inside(workdir: Path, relative: object) -> Path | None:
    """The file of that name, None where it is missing or outside of the workdir: a page shows its own run only."""
    if not isinstance(relative, str):
        return None
    try:
        path = (workdir / relative).resolve()
        return path if path.is_file() and path.is_relative_to(workdir.resolve()) else None
    except (OSError, ValueError):  # a name that no file can have, as one with a NUL: its file is missing
        return None


def is_number(value: object) -> bool:
    """Of JSON, where True is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)
