"""The sections of figures: the job's own systems and bars, and results of `d2g evaluate`."""

from __future__ import annotations

import math
from typing import Any

from d2g_jax.report.charts import Axis, format_number
from d2g_jax.report.inputs import Inputs
from d2g_jax.report.values import card, flatten, is_number, part

_SHOWN_ELSEWHERE = ("protocol", "systems", "floors", "checks", "seconds", "environment")


def measured(inputs: Inputs) -> dict[str, Any] | None:
    """The table of systems, the bars that were set beforehand, the floors and the protocol."""
    floors = part(inputs, "floors", dict)
    rest = {key: value for key, value in (inputs.result or {}).items() if key not in _SHOWN_ELSEWHERE}
    found = {
        "systems": _systems(inputs),
        "distances": _distances(inputs),
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
    flat = {name: dict(flatten(values)) if isinstance(values, dict) else {} for name, values in systems.items()}
    keys = list(dict.fromkeys(key for values in flat.values() for key in values))
    if not keys:
        return None
    columns = [[values.get(key) for values in flat.values()] for key in keys]
    return {"columns": keys, "rows": {name: [_cell(c, row) for c in columns] for row, name in enumerate(flat)}}


def _distances(inputs: Inputs) -> dict[str, Any] | None:
    """Fréchet distances on a common logarithmic axis, in per cent of its length; None for fewer than two."""
    values = {
        name: float(of["frechet_to_teacher"])
        for name, of in part(inputs, "systems", dict).items()
        if isinstance(of, dict) and _is_positive(of.get("frechet_to_teacher"))
    }
    if len(values) < 2:
        return None
    floor = part(inputs, "floors", dict).get("teacher_vs_teacher")
    floor = float(floor) if _is_positive(floor) else None
    ends = [*values.values(), *([floor] if floor else [])]
    axis = Axis(min(ends) / 1.1, max(ends) * 1.1, 0.0, 100.0, log=True)
    return {
        "dots": [{"name": name, "value": value, "left": f"{axis(value):.1f}"} for name, value in values.items()],
        "floor": floor,
        "mark": floor and f"{axis(floor):.1f}",
    }


def _is_positive(value: object) -> bool:
    return is_number(value) and math.isfinite(value) and value > 0


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
