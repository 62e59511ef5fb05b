"""The section of alarms: what left its healthy band and when, and updates that were not finite."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from d2g_jax.report.charts import format_number
from d2g_jax.report.health import explain
from d2g_jax.report.inputs import Inputs, Row


@dataclass(frozen=True)
class Spell:
    """One alarm from the line that raised it to the line that ended it (None: it lasts)."""

    run: str
    name: str
    first: Row
    ended: Row | None


def spells(run: str, rows: list[Row]) -> Iterator[Spell]:
    """The alarms of one run, in the order in which they began."""
    for index, row in enumerate(rows):
        before = rows[index - 1].alarms if index else ()
        for name in row.alarms:
            if name not in before:
                ended = next((later for later in rows[index:] if name not in later.alarms), None)
                yield Spell(run, name, row, ended)


def alarms(inputs: Inputs) -> str:
    """A table of alarms with their causes, and what was not finite; "" for a run without either."""
    runs = inputs.metrics.runs
    table = _table([spell for run, rows in runs.items() for spell in spells(run, rows)], named=len(runs) > 1)
    stops = "".join(
        f'<p class="lead"><span class="bad">{escape(_of(run, runs))}stopped: {escape(row.problem)}</span></p>'
        for run, rows in runs.items()
        for row in rows
        if row.problem
    )
    left_out = [f"{_of(run, runs)}{text}" for run, rows in runs.items() for row in rows for text in row.left_out]
    items = "".join(f"<li>{escape(text)}</li>" for text in left_out)
    listed = f'<h3 class="sub">Updates left out</h3><div class="card"><ul>{items}</ul></div>' if items else ""
    return stops + table + listed


def _of(run: str, runs: dict[str, list[Row]]) -> str:
    return f"{run}: " if len(runs) > 1 else ""


def _table(found: list[Spell], named: bool) -> str:
    if not found:
        return ""
    rows = []
    for spell in found:
        until = "until now" if spell.ended is None else f"until {format_number(spell.ended.images)}"
        value = spell.first.metrics.get(spell.name.split()[0])
        who = f"{spell.run}: {spell.name}" if named else spell.name
        rows.append(
            f'<tr><th scope="row">{escape(who)}</th><td class="number">{escape(format_number(value))}</td>'
            f'<td class="number">{format_number(spell.first.images)} {until}</td>'
            f"<td>{escape(explain(spell.name))}</td></tr>"
        )
    return (
        '<p class="lead">An alarm begins with the second line in a row outside of its band, and ends with the first '
        'inside.</p><div class="card scroll"><table class="alarms"><thead><tr><th scope="col">Alarm</th>'
        '<th scope="col" class="number">Value</th><th scope="col" class="number">Images</th>'
        f'<th scope="col">Cause and remedy</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )
