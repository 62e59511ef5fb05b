"""JSON of other people as dataclasses: which keys are its fields, and whether each value is of its field's kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, get_args, get_origin, get_type_hints

from d2g_jax.inputs.numbers import COUNT, LAYERS, Range
from d2g_jax.runtime.errors import UserError


def read_fields(
    cls: type,
    values: Mapping[str, Any],
    source: object,
    neutral: Mapping[str, tuple[Any, ...]] | None = None,
    ignored: Collection[str] = (),
) -> dict[str, Any]:
    """What a JSON object says of the fields of the dataclass `cls`, by name, with tuples for lists.

    Keys that begin with an underscore and those of `ignored` say nothing; those of `neutral` neither, as long as they
    (of a list each entry) have one of the values there. Raises `UserError` that names `source` and the key for any
    other key, and as `check_kinds` does.
    """
    names, neutral = [field.name for field in dataclasses.fields(cls)], neutral or {}
    known = {}
    for key, value in values.items():
        if key in names:
            known[key] = _as_tuples(value)
        elif key in neutral:
            if not all(one in neutral[key] for one in (value if isinstance(value, list) else [value])):
                raise UserError(f"{source}: {key} = {value!r} is not implemented; only {neutral[key][0]!r} is")
        elif not key.startswith("_") and key not in ignored:
            raise UserError(f"{source}: unknown key {key!r}; a {cls.__name__} has no such setting")
    check_kinds(cls, known, source)
    return known


def _as_tuples(value: Any) -> Any:
    """Lists of a JSON file as tuples, which can be hashed."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


def as_json(config: Any) -> dict[str, Any]:
    """A dataclass's fields as a JSON file has them."""
    fields = dataclasses.asdict(config)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}


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
