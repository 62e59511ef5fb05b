"""The sections of curves: every metric over images seen, and what the run took: time, speed, memory."""

from __future__ import annotations

import itertools
import math
from typing import Any

from d2g_jax.report.charts import COLOURS, MISSING, Series, format_number, line_chart
from d2g_jax.report.files import is_number
from d2g_jax.report.health import BANDS, Band
from d2g_jax.report.inputs import Inputs, Row
from d2g_jax.report.values import card, duration, part

_GROUPS = {
    "Health": "shaded: where a healthy run stays, from the image on from which that holds",
    "Unexplained": "R, on records kept out of training: squared error over the variance of the teacher's latents. 0: "
    "the teacher's own images; 1: no better than their mean. Near 0 squared error does; far from it, it blurs",
    "Losses": "",
    "Gradients": "norms, before clipping",
    "Everything else": "",
}
_MEMORY = {"host": "Host, peak", "device": "Fullest device, peak", "steps": "Largest compiled step"}


def curves(inputs: Inputs) -> dict[str, Any] | None:
    """Every metric as a panel, every run as a colour; those that have a band first."""
    runs, banded = inputs.metrics.runs, {band.metric: band for band in BANDS}
    names = list(dict.fromkeys(name for rows in runs.values() for row in rows for name in row.metrics))
    groups: dict[str, dict[str, str]] = {title: {} for title in _GROUPS}
    for name in [*(name for name in banded if name in names), *(name for name in names if name not in banded)]:
        groups[_group(name, name in banded)][name] = _panel(name, runs, banded.get(name))
    if not names:
        return None
    shown = [{"title": title, "remark": _GROUPS[title], "panels": of} for title, of in groups.items() if of]
    return {"runs": _runs(inputs), "groups": shown}


def speed(inputs: Inputs) -> dict[str, Any] | None:
    """Images per second over training, the seconds that each stage took, and the memory."""
    series = [Series(run, colour, *image_rates(rows)) for colour, (run, rows) in enumerate(inputs.metrics.runs.items())]
    seconds = part(inputs, "seconds", dict)
    largest = max((value for value in seconds.values() if is_number(value)), default=0) or 1
    found = {
        "chart": line_chart("images/s", [one for one in series if one.images]),
        "stages": [_stage(name, value, largest) for name, value in seconds.items()],
        "memory": card("Memory, GiB", peak_memory(inputs), format_number),
    }
    return {"runs": _runs(inputs), **found} if any(found.values()) else None


def _stage(name: str, seconds: Any, largest: float) -> dict[str, Any]:
    """`share` is a bar's length in per cent, None where nothing was measured."""
    if not is_number(seconds):
        return {"name": name, "share": None, "time": MISSING}
    share = min(max(seconds / largest, 0.0), 1.0)
    return {"name": name, "share": f"{100 * share:.1f}", "time": duration(seconds)}


def peak_memory(inputs: Inputs) -> dict[str, float]:
    """GiB by place: of the job that runs or ran last, of the result's environment where there is no status."""
    if inputs.status is not None:
        return {_MEMORY.get(place, place): value for place, value in inputs.status.memory.items()}
    found = part(inputs, "environment", dict).get("peak_memory_gib")
    return {_MEMORY["host"]: found} if is_number(found) else {}


def image_rates(rows: list[Row]) -> tuple[list[float], list[float]]:
    """(images, images per second) between neighbouring rows; the clock starts anew at a resume, which gives no rate."""
    images, rates = [], []
    for before, after in itertools.pairwise(rows):
        seconds = after.seconds - before.seconds
        if seconds > 0:
            images.append(after.images)
            rates.append((after.images - before.images) / seconds)
    return images, rates


def _group(name: str, banded: bool) -> str:
    health, unexplained, losses, gradients, rest = _GROUPS
    if banded:
        return health
    if name == "unexplained":
        return unexplained
    return losses if name.startswith("loss") else gradients if name.startswith("gradient") else rest


def _panel(name: str, runs: dict[str, list[Row]], band: Band | None) -> str:
    """The chart of one metric, "" where none of its values is finite."""
    series = [
        Series(run, colour, [row.images for row in kept], [row.metrics[name] for row in kept])
        for colour, (run, rows) in enumerate(runs.items())
        if (kept := [row for row in rows if name in row.metrics])
    ]
    if band is None:
        return line_chart(name, series)
    since = [
        next((row.images for row in rows if not band.since or band.since in row.metrics), math.inf)
        for rows in runs.values()
    ]
    return line_chart(name, series, (band.low, band.high), min(since))


def _runs(inputs: Inputs) -> list[dict[str, Any]]:
    """The legend: each run's colour, and whether it is dashed because the colours are used again."""
    return [
        {"name": name, "colour": index % COLOURS, "dashed": index >= COLOURS}
        for index, name in enumerate(inputs.metrics.runs)
    ]
