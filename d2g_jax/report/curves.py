"""The sections of curves: every metric over images seen, and what the run took: time, speed, memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from html import escape

from d2g_jax.report.charts import COLOURS, MISSING, Series, format_number, line_chart
from d2g_jax.report.health import Band
from d2g_jax.report.inputs import Inputs, Row
from d2g_jax.report.values import definitions, duration, is_number, label, part

_GROUPS = (
    ("Health", "shaded: where a healthy run stays, from the image on from which that holds"),
    (
        "Unexplained",
        "R, on records kept out of training: squared error over the variance of the teacher's latents. 0: the "
        "teacher's own images; 1: no better than their mean. Near 0 squared error does; far from it, it blurs",
    ),
    ("Losses", ""),
    ("Gradients", "norms, before clipping"),
    ("Everything else", ""),
)
_MEMORY = {"host": "Host, peak", "device": "Fullest device, peak", "steps": "Largest compiled step"}


def curves(inputs: Inputs, bands: Sequence[Band]) -> str:
    """Every metric as a panel, every run as a colour; those that have a band first."""
    runs, banded = inputs.metrics.runs, {band.metric: band for band in bands}
    names = list(dict.fromkeys(name for rows in runs.values() for row in rows for name in row.metrics))
    groups: dict[str, list[str]] = {title: [] for title, _ in _GROUPS}
    for name in [*(name for name in banded if name in names), *(name for name in names if name not in banded)]:
        groups[_group(name, name in banded)].append(_panel(name, runs, banded.get(name)))
    parts = []
    for title, remark in _GROUPS:
        if groups[title]:
            said = f" <small>{remark}</small>" if remark else ""
            parts.append(f'<h3 class="sub">{title}{said}</h3><div class="panels">{"".join(groups[title])}</div>')
    if not parts:
        return ""
    lead = '<p class="lead">Over images seen. Lines are means of neighbouring values; behind them, their extremes.</p>'
    return lead + _legend(inputs) + "".join(parts)


def speed(inputs: Inputs) -> str:
    """Images per second over training, the seconds that each stage took, and the memory."""
    series = [Series(run, colour, *image_rates(rows)) for colour, (run, rows) in enumerate(inputs.metrics.runs.items())]
    chart = line_chart("images/s", [one for one in series if one.images])
    stages = part(inputs, "seconds", dict)
    largest = max((value for value in stages.values() if is_number(value)), default=0) or 1
    items = "".join(
        f"<li><span>{escape(label(name))}</span>{_bar(value / largest) if is_number(value) else '<span></span>'}"
        f"<b>{duration(value) if is_number(value) else MISSING}</b></li>"
        for name, value in stages.items()
    )
    times = f'<div class="card stages"><h3>Time by stage</h3><ul>{items}</ul></div>' if items else ""
    memory = definitions("Memory, GiB", peak_memory(inputs), format_number)
    if not chart and not times and not memory:
        return ""
    legend = _legend(inputs) if chart else ""
    side = "".join((times, f'<div class="pairs one">{memory}</div>' if memory else ""))
    body = (
        f'<div class="beside"><div>{side}</div>{chart}</div>'
        if side and chart
        else side or f'<div class="panels">{chart}</div>'
    )
    return f'<div class="gap"></div>{legend}{body}'


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
    health, unexplained, losses, gradients, rest = (title for title, _ in _GROUPS)
    if banded:
        return health
    if name == "unexplained":
        return unexplained
    return losses if name.startswith("loss") else gradients if name.startswith("gradient") else rest


def _panel(name: str, runs: dict[str, list[Row]], band: Band | None) -> str:
    series = [
        Series(run, colour, [row.images for row in kept], [row.metrics[name] for row in kept])
        for colour, (run, rows) in enumerate(runs.items())
        if (kept := [row for row in rows if name in row.metrics])
    ]
    if band is None:
        return line_chart(name, series) or _empty_panel(name)
    since = [
        next((row.images for row in rows if not band.since or band.since in row.metrics), math.inf)
        for rows in runs.values()
    ]
    return line_chart(name, series, (band.low, band.high), min(since)) or _empty_panel(name)


def _legend(inputs: Inputs) -> str:
    names = list(inputs.metrics.runs)
    if len(names) < 2:
        return ""
    entries = "".join(
        f'<span style="--run:var(--run-{index % COLOURS})"><i{" class=dashed" if index >= COLOURS else ""}></i>'
        f"{escape(name or 'run')}</span>"
        for index, name in enumerate(names)
    )
    return f'<div class="legend">{entries}</div>'


def _empty_panel(name: str) -> str:
    remark = '<span class="remarks"><span class="bad">no finite value</span></span>'
    return f'<figure class="panel"><figcaption><h3>{escape(name)}</h3>{remark}</figcaption></figure>'


def _bar(share: float) -> str:
    return f'<span class="bar"><i style="width:{100 * min(max(share, 0.0), 1.0):.1f}%"></i></span>'
