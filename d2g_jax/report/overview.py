"""The head of the page and its foot: what is going on, the few first numbers, the settings."""

from __future__ import annotations

import math
import statistics
from datetime import UTC, datetime

from d2g_jax.report.charts import format_number
from d2g_jax.report.curves import image_rates, peak_memory
from d2g_jax.report.files import is_number
from d2g_jax.report.inputs import Inputs
from d2g_jax.report.measured import checks
from d2g_jax.report.status import RUNNING, STOPPED, Status
from d2g_jax.report.values import card, duration, part, scalar
from d2g_jax.runtime.runs import flatten

_LEAST_PATIENCE = 600.0  # seconds without a line after which a page says that its job may be dead
_LINES_MISSED = 5


def state(inputs: Inputs, now: Status) -> str:
    """A word or two for the badge: `running full, 25%`."""
    if now.state != RUNNING:
        return now.state
    running = list(inputs.metrics.runs)[-1:]
    share = f", {now.share:.0%}" if now.total else ""
    return "running" + (f" {running[0]}" if running and running[0] else "") + share


def progress(now: Status) -> str:
    """What is going on and how far it is; a stopped job's reason."""
    count = f"{format_number(now.done)} of {format_number(now.total)} {now.unit}" if now.total else ""
    if now.state == STOPPED:
        return f"Stopped{count and f' after {count}'}: {now.stage}. The same command goes on from here."
    stage = now.stage[:1].upper() + now.stage[1:] if now.stage else "At work"
    return f"{stage} · {count}" if count else stage


def patience(inputs: Inputs) -> int:
    """Seconds after which a running job's page is overdue: the time of several lines, ten minutes at least."""
    last = [rows for rows in inputs.metrics.runs.values() if len(rows) > 1][-1:]
    each = last[0][-1].seconds - last[0][-2].seconds if last else 0.0
    return round(max(_LEAST_PATIENCE, _LINES_MISSED * each if math.isfinite(each) else 0.0))


def written(now: Status) -> dict[str, str]:
    """When the job last wrote."""
    moment = datetime.fromisoformat(now.written) if now.written else datetime.now(UTC)
    return {
        "word": "Written" if now.state == RUNNING or not now.written else now.state.capitalize(),
        "moment": moment.isoformat(timespec="seconds"),
        "text": moment.strftime("%d %B %Y, %H:%M UTC").lstrip("0"),
    }


def environment(inputs: Inputs) -> dict[str, str]:
    """On what the job runs, with which versions."""
    for data in (inputs.result, inputs.config):
        found = (data or {}).get("environment")
        if isinstance(found, dict):
            leaves = {key.rpartition(".")[2]: value for key, value in flatten(found).items()}
            return {key.replace("_", " "): scalar(value) for key, value in leaves.items()}
    return {}


def tiles(inputs: Inputs) -> list[tuple[str, str, str]]:
    """The few numbers that one looks for first: of each its name, its value and what that is of."""
    found = []
    runs = inputs.metrics.runs
    if runs:
        seen = {rows[-1].images for rows in runs.values()}
        each = f"in each of {len(runs)} runs" if len(seen) == 1 else f"in the longest of {len(runs)} runs"
        found.append(("Images seen", format_number(max(seen)), each if len(runs) > 1 else ""))
        rates = [rate for rows in runs.values() for rate in image_rates(rows)[1] if math.isfinite(rate)]
        if rates:
            found.append(("Training speed", format_number(statistics.median(rates)), "images/s"))
    stages = part(inputs, "seconds", dict)
    if stages:
        total = sum(value for value in stages.values() if is_number(value))
        found.append(("Time", duration(total), f"{len(stages)} stages"))
    memory = peak_memory(inputs)
    if memory:
        place, peak = list(memory.items())[-1]
        found.append(("Memory", f"{format_number(peak)} GiB", place[:1].lower() + place[1:]))
    bars = checks(inputs)
    if bars:
        met = sum(bar.get("met") is True for bar in bars)
        found.append(("Bars met", str(met), f"of {len(bars)}"))
    return found


def settings(inputs: Inputs) -> dict[str, dict[str, str]]:
    """The resolved config: one card for what stands at the top level and one for each group."""
    config = {key: value for key, value in (inputs.config or {}).items() if key != "environment"}
    cards = card("General", {key: value for key, value in config.items() if not isinstance(value, dict)})
    for key, value in config.items():
        if isinstance(value, dict):
            cards |= card(key, value)
    return cards
