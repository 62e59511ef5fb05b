"""The sections of figures: the job's own systems and bars, and results of `d2g evaluate`."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from d2g_jax.report.charts import MISSING, dot_chart, format_number
from d2g_jax.report.inputs import Inputs
from d2g_jax.report.values import definitions, flatten, is_number, label, part

_SHOWN_ELSEWHERE = ("protocol", "systems", "floors", "checks", "seconds", "environment")


def measured(inputs: Inputs) -> str:
    """The table of systems, the bars that were set beforehand, the floors and the protocol."""
    result = inputs.result
    if result is None:
        return ""
    parts = [_systems_table(inputs), _distances(inputs), _checks_table(inputs)]
    rest = {key: value for key, value in result.items() if key not in _SHOWN_ELSEWHERE}
    cards = [
        definitions("Protocol", part(inputs, "protocol", dict)),
        definitions("Floors: two disjoint sets of the same kind", part(inputs, "floors", dict), format_number),
        definitions("Also in result.json", rest),
    ]
    if any(cards):
        parts.append(f'<div class="gap"></div><div class="pairs">{"".join(cards)}</div>')
    return "".join(parts)


def _systems_table(inputs: Inputs) -> str:
    systems = part(inputs, "systems", dict)
    flat = {name: dict(flatten(values)) if isinstance(values, dict) else {} for name, values in systems.items()}
    keys = list(dict.fromkeys(key for values in flat.values() for key in values))
    if not keys:
        return ""
    columns = {key: [values.get(key) for values in flat.values()] for key in keys}
    head = "".join(f'<th scope="col" class="number">{escape(label(key))}</th>' for key in keys)
    rows = []
    for index, name in enumerate(flat):
        cells = "".join(f'<td class="number">{_cell(column, index)}</td>' for column in columns.values())
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    return (
        '<p class="lead">An en dash stands for what was not measured.</p>'
        '<div class="card scroll"><table class="measured"><thead><tr><th scope="col">System</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _distances(inputs: Inputs) -> str:
    key, floor = "frechet_to_teacher", part(inputs, "floors", dict).get("teacher_vs_teacher")
    systems = {
        name: float(values[key])
        for name, values in part(inputs, "systems", dict).items()
        if isinstance(values, dict) and is_number(values.get(key))
    }
    floor = float(floor) if is_number(floor) and math.isfinite(floor) and floor > 0 else None
    return dot_chart("Fréchet distance to the teacher", systems, floor)


def _cell(column: list[Any], index: int) -> str:
    value = column[index]
    numbers = [float(other) for other in column if is_number(other) and math.isfinite(other)]
    if not is_number(value) or not math.isfinite(value) or value in (0, None):
        return escape(format_number(value))
    if all(number.is_integer() for number in numbers) and max(numbers) > 1:
        text = format_number(value)
    else:  # the same number of decimals down a column, so that the eye can compare
        smallest = min(abs(number) for number in numbers if number)
        decimals = min(max(1 - math.floor(math.log10(smallest)), 3), 6) if max(map(abs, numbers)) <= 1 else 2
        text = f"{value:,.{decimals}f}".replace("-", "−")
    return text


def _checks_table(inputs: Inputs) -> str:
    verdicts = {True: ("met", "✓ met"), False: ("missed", "✗ missed")}
    rows = []
    for check in checks(inputs):
        met = check.get("met")
        kind, word = verdicts[met] if isinstance(met, bool) else ("absent", "not measured")
        rows.append(
            f'<tr><th scope="row">{escape(str(check.get("name", MISSING)))}</th>'
            f'<td class="number" data-label="value">{escape(format_number(check.get("value")))}</td>'
            f'<td class="number" data-label="bar">{escape(format_number(check.get("bar")))}</td>'
            f'<td class="verdict {kind}">{word}</td></tr>'
        )
    if not rows:
        return ""
    return (
        '<h3 class="sub">Bars set beforehand</h3><div class="card scroll"><table class="checks"><thead><tr>'
        '<th scope="col">What</th><th scope="col" class="number">Value</th><th scope="col" class="number">Bar</th>'
        f'<th scope="col">Verdict</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def checks(inputs: Inputs) -> list[dict[str, Any]]:
    return [check for check in part(inputs, "checks", list) if isinstance(check, dict)]


def evaluated(inputs: Inputs) -> str:
    """Results of `d2g evaluate` in evaluation/, one row each; a column holds only what was measured the same way."""
    if not inputs.evaluations:
        return ""
    from d2g_jax.results.metrics import METRICS
    from d2g_jax.results.table import comparable

    results = inputs.evaluations
    columns: list[tuple[str, dict[str, Any]]] = []
    for metric in METRICS:
        for result in results:
            if metric in result["metrics"] and (metric, comparable(result, metric)) not in columns:
                columns.append((metric, comparable(result, metric)))
    head = "".join(
        f'<th scope="col" class="number">{escape(METRICS[metric].title)} <sup>{number}</sup></th>'
        for number, (metric, _) in enumerate(columns, 1)
    )
    rows = []
    for result in results:
        cells = "".join(f'<td class="number">{_measured_cell(result, metric, key)}</td>' for metric, key in columns)
        name = result["system"] + ("" if result["complete"] else " (incomplete)")
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    notes = "".join(f"<li>{escape(_how(key))}</li>" for _, key in columns)
    return (
        '<p class="lead">Results of d2g evaluate. A column holds only numbers that were measured the same way; how, '
        'stands below by its number.</p><div class="card scroll"><table class="measured"><thead><tr>'
        '<th scope="col">System</th>'
        f'{head}</tr></thead><tbody>{"".join(rows)}</tbody></table><ol class="how">{notes}</ol></div>'
    )


def _measured_cell(result: dict[str, Any], metric: str, key: dict[str, Any]) -> str:
    from d2g_jax.results.table import comparable

    if metric not in result["metrics"] or comparable(result, metric) != key:
        return MISSING
    value = result["metrics"][metric]
    if isinstance(value, dict):
        value = value["all"] if metric == "accuracy" else value["mean"]
    return escape(format_number(value))


def _how(key: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in key.items())
