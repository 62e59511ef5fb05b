"""Results of `d2g evaluate` as they are read back: whole and of the right shape, or one line that names the key."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from d2g_jax.inputs.text import read_json
from d2g_jax.results.metrics import DIVERSITY, KERNEL, METRICS, REFERENCE, TEACHER, weights_of
from d2g_jax.runtime.errors import UserError

FORMAT = 1
"""Of the result file: raised when a reader of the old one would go wrong."""

Keys = tuple[str, ...]
"""Where a value stands: names from the outside in."""

_TEXT, _OBJECT, _NUMBER, _COUNT, _FLAG = "text", "an object", "a finite number", "a whole number", "true or false"
_SHOWN = 40  # characters of a wrong value in a message

_ALWAYS: dict[Keys, str] = {
    ("system",): _TEXT,
    ("complete",): _FLAG,
    ("samples",): _COUNT,
    ("protocol", "name"): _TEXT,
    ("protocol", "sha256"): _TEXT,
    ("protocol", "features"): _TEXT,
    ("images", "sha256"): _TEXT,
    ("images", "formats"): _OBJECT,
    ("weights",): _OBJECT,
    ("metrics",): _OBJECT,
}
_KID = {"mean": _NUMBER, "subset_size": _COUNT}
_PARTS = {"accuracy": {"all": _NUMBER}}
_DIVERSITY = {"mean": _NUMBER, "prompts": _COUNT, "seeds": _COUNT}


def read_result(file: str | Path) -> dict[str, Any]:
    """A file of `d2g evaluate`. Raises `UserError` for one that is missing, damaged or of another format."""
    result = read_json(Path(file), "give a result of `d2g evaluate`")
    if "protocol" not in result or "metrics" not in result:
        raise UserError(f"{file}: no result of `d2g evaluate`")
    if result.get("format") != FORMAT:
        raise UserError(f"{file}: format {result.get('format')!r} is not {FORMAT}; evaluate again")
    for keys, wanted in _wanted(result, file):
        _check(result, keys, wanted, file)
    return result


def _wanted(result: dict[str, Any], file: str | Path) -> Iterator[tuple[Keys, str]]:
    """Every key that a table reads; later ones depend on earlier ones, which have been checked by then."""
    yield from _ALWAYS.items()
    for name in ("prompts", "drawing"):
        if name not in result:
            raise UserError(f"{file}: {name} is missing; evaluate again")
    if result["prompts"] is not None:
        yield ("prompts", "sha256"), _TEXT
    if result["drawing"] is not None:
        yield ("drawing",), _OBJECT
        if "network_calls" in result["drawing"]:  # `d2g sample` does not say
            yield ("drawing", "network_calls"), _COUNT
    for name in METRICS:
        if name in result["metrics"]:
            yield from _wanted_of(name, result["protocol"]["features"])


def _wanted_of(metric: str, features: str) -> Iterator[tuple[Keys, str]]:
    """What the value of a metric has to be, and what says how it was measured."""
    needs, weights = METRICS[metric].needs, weights_of(metric, features)
    parts = _DIVERSITY if needs == DIVERSITY else _KID if METRICS[metric].distance == KERNEL else _PARTS.get(metric)
    if parts is None:
        yield ("metrics", metric), _NUMBER
    else:
        yield from ((("metrics", metric, part), wanted) for part, wanted in parts.items())
    if weights is not None:
        yield ("weights", weights, "sha256"), _TEXT
    if needs == REFERENCE:
        yield ("reference", "images_sha256"), _TEXT
    if needs == TEACHER:
        yield ("teacher", "sha256"), _TEXT


def _check(result: dict[str, Any], keys: Keys, wanted: str, file: str | Path) -> None:
    value: Any = result
    for depth, key in enumerate(keys, 1):
        if not isinstance(value, dict):
            raise UserError(f"{file}: {'.'.join(keys[: depth - 1])} is {_short(value)}, not an object; evaluate again")
        if key not in value:
            raise UserError(f"{file}: {'.'.join(keys[:depth])} is missing; evaluate again")
        value = value[key]
    if not _is(value, wanted):
        raise UserError(f"{file}: {'.'.join(keys)} is {_short(value)}, not {wanted}; evaluate again")


def _is(value: object, wanted: str) -> bool:
    if wanted in (_TEXT, _OBJECT, _FLAG):
        return isinstance(value, {_TEXT: str, _OBJECT: dict, _FLAG: bool}[wanted])
    if isinstance(value, float):
        return wanted == _NUMBER and math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
