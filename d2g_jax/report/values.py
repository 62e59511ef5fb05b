"""How values are written: names, numbers, settings, durations."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from d2g_jax.report.charts import MISSING, format_number
from d2g_jax.report.inputs import Inputs
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.runs import flatten

_TITLES = {
    "frechet_to_teacher": "Fréchet to teacher",
    "unexplained": "R, unexplained",
    "frechet_to_real": "Fréchet to real",
    "network_calls": "Network calls",
    "seconds_per_image": "Seconds per image",
}


def label(key: str) -> str:
    """`learning_rate` -> `Learning rate`, `accuracy.ink` -> `Ink right`; names of the field are looked up."""
    first, _, part = key.partition(".")
    text = f"{part} right" if first == "accuracy" and part else key
    text = text.replace("_", " ").replace(".", " ").strip()
    return _TITLES.get(key) or text[:1].upper() + text[1:]


def scalar(value: object) -> str:
    """One setting as plain text, exactly: 1e-05 stays 1e-05."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def part(inputs: Inputs, key: str, kind: type) -> Any:
    """result[key], empty where it is absent; UserError where it is of another kind."""
    value = (inputs.result or {}).get(key)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise UserError(f"{inputs.workdir / 'result.json'}: key {key!r} must be a JSON {kind.__name__}; write it again")
    return value


def card(title: str, data: dict[str, Any], write: Callable[[Any], str] = scalar) -> dict[str, dict[str, str]]:
    """A title and what is listed under it, as text; an empty dict for no data."""
    items = {key: write(value) for key, value in flatten(data).items()}
    return {title: items} if items else {}


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return format_number(seconds)
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
