"""JSON of other people as dataclasses: whether each value is of its field's kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

from d2g_jax.inputs.numbers import COUNT, LAYERS, Range
from d2g_jax.runtime.errors import UserError


def check_kinds(cls: type, values: Mapping[str, Any], source: object) -> None:
    """Raises `UserError` for a field of `cls` whose value is of another kind, such as null or text for a number."""
    for name, kind in get_type_hints(cls).items():
        if name in values and not _is(values[name], kind):
            raise UserError(f"{source}: {name} = {values[name]!r}; give {getattr(kind, '__name__', kind)}")


def check_sizes(values: Mapping[str, Any], source: object) -> None:
    """Raises `UserError` for a list that is empty and for whole numbers below 1, or more layers than `LAYERS`."""
    for name, value in values.items():
        if value == ():
            raise UserError(f"{source}: {name} is empty; give one for each level")
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) is int:
                (LAYERS if "layers" in name else COUNT).check(f"{source}: {name}", number)


def _is(value: Any, kind: Any) -> bool:
    origin, kinds = get_origin(kind) or kind, get_args(kind)
    if origin is tuple:
        count = len(kinds) if kinds[-1] is not ... else None
        return isinstance(value, tuple) and count in (None, len(value)) and all(_is(part, kinds[0]) for part in value)
    if kinds and origin is not dict:
        return any(_is(value, one) for one in kinds)
    return (
        value in Range() if kind is float else isinstance(value, origin) and (kind is bool) == isinstance(value, bool)
    )
