"""The sections of figures: the job's own systems and bars, and results of `d2g evaluate`."""

from __future__ import annotations

import math
from typing import Any

from d2g_jax.report.charts import format_number
from d2g_jax.report.files import is_number
from d2g_jax.report.inputs import Inputs
from d2g_jax.report.values import card, part
from d2g_jax.runtime.runs import flatten

_SHOWN_ELSEWHERE = ("protocol", "systems", "floors", "checks", "seconds", "environment")


def measured(inputs: Inputs) -> dict[str, Any] | None:
    """The table of systems, the bars that were set beforehand, the floors and the protocol."""
    floors = part(inputs, "floors", dict)
    rest = {key: value for key, value in (inputs.result or {}).items() if key not in _SHOWN_ELSEWHERE}
    found = {
        "systems": _systems(inputs),
        "checks": checks(inputs),
        "cards": {
            **card("Protocol", part(inputs, "protocol", dict)),
            **card("Floors: two disjoint sets of the same kind", floors, format_number),
            **card("Also in result.json", rest),
        },
    }
    return found if any(found.values()) else None


def _systems(inputs: Inputs) -> dict[str, Any] | None:
    systems = part(inputs, "systems", dict)
    flat = {name: flatten(values) if isinstance(values, dict) else {} for name, values in systems.items()}
    keys = list(dict.fromkeys(key for values in flat.values() for key in values))
    if not keys:
        return None
    columns = [[values.get(key) for values in flat.values()] for key in keys]
    return {"columns": keys, "rows": {name: [_cell(c, row) for c in columns] for row, name in enumerate(flat)}}


def _cell(column: list[Any], index: int) -> str:
    value = column[index]
    numbers = [float(other) for other in column if is_number(other) and math.isfinite(other)]
    if not is_number(value) or not math.isfinite(value) or value in (0, None):
        return format_number(value)
    if all(number.is_integer() for number in numbers) and max(numbers) > 1:
        return format_number(value)
    # the same number of decimals down a column, so that the eye can compare
    smallest = min(abs(number) for number in numbers if number)
    decimals = min(max(1 - math.floor(math.log10(smallest)), 3), 6) if max(map(abs, numbers)) <= 1 else 2
    return f"{value:,.{decimals}f}".replace("-", "−")


def checks(inputs: Inputs) -> list[dict[str, Any]]:
    return [check for check in part(inputs, "checks", list) if isinstance(check, dict)]


def evaluated(inputs: Inputs) -> dict[str, Any] | None:
    """Results of `d2g evaluate` in evaluation/, one row each; a column holds only what was measured the same way."""
    results = inputs.evaluations
    if not results:
        return None
    from d2g_jax.results import table

    columns = table.columns(results)
    return {
        "titles": [column.title for column in columns],
        "rows": [(table.system(one), [column.values[i] for column in columns]) for i, one in enumerate(results)],
        "how": list(map(str, columns)),
    }
