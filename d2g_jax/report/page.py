"""The page: which sections a run has, in which order, and the one file that they end in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from d2g_jax import health
from d2g_jax.atomic import write_text
from d2g_jax.errors import UserError
from d2g_jax.report import sections
from d2g_jax.report.alarms import alarms
from d2g_jax.report.charts import format_number
from d2g_jax.report.inputs import Inputs, read_inputs

BANDS: dict[str, tuple[float, float]] = {band.metric: (band.low, band.high) for band in health.BANDS}
"""Where a healthy run stays: metric -> (low, high), drawn behind the curve of that name."""


def write_report(
    workdir: Path, *, finished: bool | None = None, bands: Mapping[str, tuple[float, float]] = BANDS
) -> Path:
    """Write `report.html` from what the workdir holds, and return its path.

    workdir: a folder with any of config.json, metrics.jsonl, result.json, samples/comparison.json and
    samples/[RUN/]images_XXXXXXXX.png. What is absent leaves its section out. The page is one file: it loads nothing.
    finished: whether the run is over; None takes it from the files (a result, or all of config train.images seen).
    bands: metric -> (low, high) of a healthy run, in the metric's own unit.
    Raises UserError when the folder is missing, has none of these, holds a broken one, or cannot be written.
    """
    workdir = Path(workdir)
    path = workdir / "report.html"
    try:
        inputs = read_inputs(workdir)
        over = _is_over(inputs) if finished is None else finished
        write_text(path, _page(inputs, over, bands))
    except OSError as error:
        problem = f"{path}: cannot be made ({error.strerror or error})"
        raise UserError(f"{problem}; make the workdir's files readable and the folder writable") from error
    return path


def _page(inputs: Inputs, over: bool, bands: Mapping[str, tuple[float, float]]) -> str:
    made = [
        ("samples", "Side by side", sections.comparison(inputs)),
        ("measured", "Measured", sections.measured(inputs)),
        ("alarms", "Alarms", alarms(inputs)),
        ("curves", "Curves", sections.curves(inputs, bands)),
        ("time", "Samples over time", sections.timelines(inputs)),
        ("speed", "Speed", sections.speed(inputs)),
        ("settings", "Settings", sections.settings(inputs)),
    ]
    present = [(name, title, body) for name, title, body in made if body]
    body = "\n".join(f'<section id="{name}">\n<h2>{title}</h2>\n{body}\n</section>' for name, title, body in present)
    template = resources.files("d2g_jax.report").joinpath("page.html").read_text("utf-8")
    return Template(template).substitute(
        title=escape(inputs.workdir.resolve().name),
        state=_state(inputs, over),
        state_class="finished" if over else "running",
        facts=_facts(inputs),
        navigation="".join(f'<a href="#{name}">{title}</a>' for name, title, _ in present),
        sections=sections.tiles(inputs) + "\n" + body,
        notes=_notes(inputs),
    )


def _planned_images(inputs: Inputs) -> float:
    """Images that a run is to see by its config, NaN where the config does not say."""
    train = (inputs.config or {}).get("train")
    images = train.get("images") if isinstance(train, dict) else None
    return float(images) if isinstance(images, int | float) and images > 0 else math.nan


def _is_over(inputs: Inputs) -> bool:
    if inputs.result is not None:
        return True
    # Named runs are a job's several students: the last one present may be followed by another, only a result says.
    runs = inputs.metrics.runs
    return list(runs) == [""] and runs[""][-1].images >= _planned_images(inputs)


def _state(inputs: Inputs, over: bool) -> str:
    if over:
        return "finished"
    if not inputs.metrics.runs:
        return "running"
    name, rows = list(inputs.metrics.runs.items())[-1]
    planned = _planned_images(inputs)
    share = f", {min(rows[-1].images / planned, 1):.0%}" if math.isfinite(planned) else ""
    return "running" + (f" {escape(name)}" if name else "") + share


def _facts(inputs: Inputs) -> str:
    now = datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC").lstrip("0")
    facts = [("Written", now)]
    facts += [(key, sections.scalar(value)) for key, value in _environment(inputs).items()]
    return "".join(f"<span>{escape(key)} <b>{escape(value)}</b></span>" for key, value in facts)


def _environment(inputs: Inputs) -> dict[str, Any]:
    for data in (inputs.result, inputs.config):
        environment = (data or {}).get("environment")
        if isinstance(environment, dict):
            return dict(sections.flatten(environment, leaves_only=True))
    return {}


def _notes(inputs: Inputs) -> str:
    metrics = inputs.metrics
    notes = []
    if metrics.broken:
        lines = "line is" if metrics.broken == 1 else "lines are"
        tail = "; the last line is one of them, as a killed run leaves it" if metrics.broken_tail else ""
        notes.append(f"metrics.jsonl: {metrics.broken} {lines} not whole and left out{tail}.")
    if metrics.replaced:
        lines = "line was" if metrics.replaced == 1 else "lines were"
        count = format_number(metrics.replaced)
        notes.append(f"metrics.jsonl: {count} {lines} written again after a resume; the later is shown.")
    notes.append("This page is one file: it loads nothing and sends nothing.")
    return "".join(f"<p>{escape(note)}</p>" for note in notes)
