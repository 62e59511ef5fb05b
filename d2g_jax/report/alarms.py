"""The section of alarms: what left its healthy band and when, and updates that were not finite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from d2g_jax.report.health import explain
from d2g_jax.report.inputs import Inputs, Row


def alarms(inputs: Inputs) -> dict[str, list[Any]] | None:
    """Alarms with their causes, what stopped a run, and what was not finite; None for runs without any."""
    runs = inputs.metrics.runs
    of = {run: f"{run}: " if len(runs) > 1 else "" for run in runs}
    rows = [(run, row) for run, rows in runs.items() for row in rows]
    found = {
        "stops": [f"{of[run]}stopped: {row.problem}" for run, row in rows if row.problem],
        "spells": [spell for run, lines in runs.items() for spell in _spells(of[run], lines)],
        "left_out": [of[run] + text for run, row in rows for text in row.left_out],
    }
    return found if any(found.values()) else None


def _spells(of: str, rows: list[Row]) -> Iterator[dict[str, Any]]:
    """The alarms of one run in the order in which they began: from which image to which (None: they last), and why."""
    for index, row in enumerate(rows):
        before = rows[index - 1].alarms if index else ()
        for name in row.alarms:
            if name not in before:
                ended = next((later.images for later in rows[index:] if name not in later.alarms), None)
                yield {
                    "name": of + name,
                    "value": row.metrics.get(name.split()[0]),
                    "first": row.images,
                    "ended": ended,
                    "cause": explain(name),
                }
