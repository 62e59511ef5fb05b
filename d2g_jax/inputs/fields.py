"""JSON of other people as dataclasses: whether each value is of its field's kind."""

from __future__ import annotations

from typing import Any, get_args, get_origin, get_type_hints

from d2g_jax.inputs.numbers import Range
from d2g_jax.runtime.errors import UserError


def check_kinds(made: Any, source: str) -> None:
    """Raises `UserError` for a field that holds another kind than its annotation, such as null or text for a number."""
    for name, kind in get_type_hints(type(made)).items():
        if not _is(value := getattr(made, name), kind):
            raise UserError(f"{source}: {name} = {value!r}; give {getattr(kind, '__name__', kind)}")


def _is(value: Any, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is(part, get_args(kind)[0]) for part in value)
    if get_args(kind):
        return any(_is(value, one) for one in get_args(kind))
    return value in Range() if kind is float else isinstance(value, kind) and (kind is bool) == isinstance(value, bool)
