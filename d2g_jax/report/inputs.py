"""What a workdir holds for its page, read once and checked. Nothing here knows of HTML."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from d2g_jax.report.files import is_number, read_object
from d2g_jax.report.galleries import find_comparison, find_galleries
from d2g_jax.report.status import Status, read_status
from d2g_jax.runtime.errors import UserError

T = TypeVar("T")
_NOT_METRICS = ("run", "images", "step", "seconds")
_LOOKED_FOR = "config.json, metrics.jsonl, result.json, status.json, samples/ or evaluation/*.json"


@dataclass(frozen=True)
class Row:
    """One line of metrics.jsonl. `seconds` is the run's own clock, NaN where the line has none.

    `alarms` are those that are on, `left_out` the updates since the line before that were not finite, `problem` the one
    that stopped the run.
    """

    images: float
    seconds: float
    metrics: dict[str, float]
    alarms: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Metrics:
    """metrics.jsonl by run, in order of first appearance; a run without a name is called ''."""

    runs: dict[str, list[Row]]
    broken: int  # lines that are not a JSON object with a number "images"
    broken_tail: bool  # the last line is one of them: the writer was killed
    replaced: int  # lines that a resumed run has written again


@dataclass(frozen=True)
class Inputs:
    """Everything that a page is made of; None or empty where the workdir does not have it."""

    workdir: Path
    config: dict[str, Any] | None
    metrics: Metrics
    result: dict[str, Any] | None
    comparison: dict[str, Any] | None  # of the form `galleries.COMPARISON`
    timelines: dict[str, list[tuple[int, Path]]]  # run -> (images seen, sample grid) in that order
    galleries: dict[str, dict[str, Any]]  # by run, of the form `galleries.GALLERY`
    evaluations: list[dict[str, Any]]  # results of `d2g evaluate`, by name of their files
    status: Status | None


def read_inputs(workdir: Path) -> Inputs:
    """Read config.json, metrics.jsonl, result.json, status.json, what is in samples/ and evaluation/*.json.

    A job of several runs has them in students/RUN/, and their samples there.
    Raises UserError when the folder is missing or has none of them, and for a file that is not what it should be.
    """
    if not workdir.is_dir():
        raise UserError(f"{workdir}: no such workdir; give --workdir=DIR of a run")
    metrics = read_metrics(workdir / "metrics.jsonl")
    inputs = Inputs(
        workdir=workdir,
        config=read_object(workdir / "config.json"),
        metrics=metrics,
        result=read_object(workdir / "result.json"),
        comparison=find_comparison(workdir),
        timelines=_in_order(metrics, _find_timelines(workdir)),
        galleries=_in_order(metrics, find_galleries(workdir)),
        evaluations=_read_evaluations(workdir / "evaluation"),
        status=read_status(workdir),
    )
    found = (inputs.config, metrics.runs, inputs.result, inputs.comparison, inputs.timelines, inputs.status)
    if not any((*found, inputs.evaluations, metrics.broken)):
        raise UserError(f"{workdir}: nothing to report on, it has no {_LOOKED_FOR}; give --workdir=DIR of a run")
    return inputs


def read_metrics(path: Path) -> Metrics:
    """Read metrics.jsonl; an absent file is an empty one.

    A line that is not whole is counted, not raised: a killed run leaves one. A resumed run goes back to its last
    checkpoint and counts images from there, so a line makes those of its run with as many images or more obsolete.
    """
    runs: dict[str, list[Row]] = {}
    broken = replaced = 0
    broken_tail = False
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []
    for line in filter(str.strip, lines):
        parsed = _parse_line(line)
        broken_tail = parsed is None
        if parsed is None:
            broken += 1
            continue
        name, row = parsed
        rows = runs.setdefault(name, [])
        while rows and rows[-1].images >= row.images:
            rows.pop()
            replaced += 1
        rows.append(row)
    return Metrics(runs, broken, broken_tail, replaced)


def _parse_line(line: str) -> tuple[str, Row] | None:
    try:
        data = json.loads(line, parse_int=float)  # so that a whole number without end is infinite, not an error
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or not is_number(data.get("images")) or not math.isfinite(data["images"]):
        return None
    values = {key: _number_or_nan(value) for key, value in data.items() if value is None or is_number(value)}
    metrics = {key: value for key, value in values.items() if key not in _NOT_METRICS}
    texts = {key: _strings(data.get(key)) for key in ("alarms", "left_out")}
    problem = data["problem"] if isinstance(data.get("problem"), str) else ""
    seconds = values.get("seconds", math.nan)
    row = Row(values["images"], seconds, metrics, **texts, problem=problem)
    return str(data.get("run", "")), row


def _strings(value: object) -> tuple[str, ...]:
    return tuple(text for text in value if isinstance(text, str)) if isinstance(value, list) else ()


def _number_or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _read_evaluations(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("*.json"))
    if not files:
        return []
    from d2g_jax.results.results import read_result  # of another job; a page seldom needs it

    return [read_result(file) for file in files]


def _in_order(metrics: Metrics, found: dict[str, T]) -> dict[str, T]:
    """Runs as in the curves; what has no curve stands first."""
    order = list(metrics.runs)
    return dict(sorted(found.items(), key=lambda one: order.index(one[0]) if one[0] in order else -1))


def _find_timelines(workdir: Path) -> dict[str, list[tuple[int, Path]]]:
    timelines: dict[str, list[tuple[int, Path]]] = {}
    patterns = ("samples/images_*.png", "samples/*/images_*.png", "students/*/samples/images_*.png")
    for path in sorted(path for pattern in patterns for path in workdir.glob(pattern)):
        match = re.fullmatch(r"images_(\d+)\.png", path.name)
        if match:
            parts = path.relative_to(workdir).parts
            name = "" if len(parts) == 2 else parts[1]  # samples/RUN/ or students/RUN/samples/
            timelines.setdefault(name, []).append((int(match[1]), path))
    return {name: sorted(found) for name, found in timelines.items()}
