"""The sections of the page: each a function of the inputs that returns HTML, or "" where the run has nothing for it."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from d2g_jax.errors import UserError
from d2g_jax.report.charts import COLOURS, MISSING, Series, dot_chart, format_number, line_chart
from d2g_jax.report.inputs import Inputs, Row

_LARGEST_PLAIN = 96 * 1024  # bytes; a larger image is embedded as WebP, so that a page of SDXL grids stays sendable
_LONGEST_SIDE = 1024
_PIXELATED_IMAGE, _PIXELATED_SHEET = 128, 512  # px; anything narrower is shown enlarged, with its pixels visible
_MOST_STEPS = 40  # sample grids on one slider
_TITLES = {
    "frechet_to_teacher": "Fréchet to teacher",
    "frechet_to_real": "Fréchet to real",
    "accuracy.digit": "Digit right",
    "accuracy.weight": "Weight right",
    "accuracy.slant": "Slant right",
    "accuracy.all": "All three right",
    "network_calls": "Network calls",
    "seconds_per_image": "Seconds per image",
}
_SHOWN_ELSEWHERE = ("protocol", "systems", "floors", "checks", "seconds", "environment")


def label(key: str) -> str:
    """`learning_rate` -> `Learning rate`; the names that the field writes otherwise are looked up."""
    text = key.replace("_", " ").replace(".", " ").strip()
    return _TITLES.get(key) or text[:1].upper() + text[1:]


def scalar(value: object) -> str:
    """One setting as plain text, exactly: 1e-05 stays 1e-05."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def flatten(data: Mapping[str, Any], leaves_only: bool = False, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested keys joined by dots; with `leaves_only` the last key alone."""
    for key, value in data.items():
        name = str(key) if leaves_only else f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from flatten(value, leaves_only, f"{name}.")
        else:
            yield name, value


def tiles(inputs: Inputs) -> str:
    """The few numbers that one looks for first."""
    found = []
    runs = inputs.metrics.runs
    if runs:
        seen = {rows[-1].images for rows in runs.values()}
        each = f"in each of {len(runs)} runs" if len(seen) == 1 else f"in the longest of {len(runs)} runs"
        found.append(("Images seen", format_number(max(seen)), each if len(runs) > 1 else ""))
        rates = [rate for rows in runs.values() for rate in image_rates(rows)[1] if math.isfinite(rate)]
        if rates:
            found.append(("Training speed", format_number(statistics.median(rates)), "images/s"))
    stages = _part(inputs, "seconds", dict)
    if stages:
        total = sum(value for value in stages.values() if _is_number(value))
        found.append(("Time", _duration(total), f"{len(stages)} stages"))
    checks = _checks(inputs)
    if checks:
        met = sum(check.get("met") is True for check in checks)
        found.append(("Bars met", str(met), f"of {len(checks)}"))
    cells = "".join(
        f'<div class="tile card"><dt>{name}</dt><dd>{value}<small>{unit}</small></dd></div>'
        for name, value, unit in found
    )
    return f'<dl class="tiles">{cells}</dl>' if cells else ""


def comparison(inputs: Inputs) -> str:
    """One row per prompt, one column per system, the same noise along a row."""
    shown = inputs.comparison
    if not shown or not shown.prompts or not shown.names:
        return ""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in shown.names)
    rows = []
    for index, prompt in enumerate(shown.prompts):
        cells = "".join(
            f"<td>{_image(images[index], f'{name}: {prompt}', _PIXELATED_IMAGE)}</td>"
            for name, images in zip(shown.names, shown.images, strict=True)
        )
        rows.append(f'<tr><th scope="row">{escape(prompt)}</th>{cells}</tr>')
    return (
        '<p class="lead">The same prompt and the same noise along each row.</p><div class="card scroll">'
        f'<table class="compare"><thead><tr><th scope="col">Prompt</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def measured(inputs: Inputs) -> str:
    """The table of systems, the bars that were set beforehand, the floors and the protocol."""
    result = inputs.result
    if result is None:
        return ""
    parts = [_systems_table(inputs), _distances(inputs), _checks_table(inputs)]
    rest = {key: value for key, value in result.items() if key not in _SHOWN_ELSEWHERE}
    cards = [
        _definitions("Protocol", _part(inputs, "protocol", dict)),
        _definitions("Floors: two disjoint sets of the same kind", _part(inputs, "floors", dict), format_number),
        _definitions("Also in result.json", rest),
    ]
    if any(cards):
        parts.append(f'<div class="gap"></div><div class="pairs">{"".join(cards)}</div>')
    return "".join(parts)


def curves(inputs: Inputs, bands: Mapping[str, tuple[float, float]]) -> str:
    """Every metric as a panel, every run as a colour."""
    runs = inputs.metrics.runs
    names = list(dict.fromkeys(name for rows in runs.values() for row in rows for name in row.metrics))
    panels = []
    for name in names:
        series = [
            Series(run, colour, [row.images for row in kept], [row.metrics[name] for row in kept])
            for colour, (run, rows) in enumerate(runs.items())
            if (kept := [row for row in rows if name in row.metrics])
        ]
        panels.append(line_chart(name, series, bands.get(name)) or _empty_panel(name))
    if not panels:
        return ""
    lead = '<p class="lead">Over images seen. Lines are means of neighbouring values; behind them, their extremes.</p>'
    return f'{lead}{_legend(inputs)}<div class="panels">{"".join(panels)}</div>'


def timelines(inputs: Inputs) -> str:
    """The sample grids that training left behind, on a slider for each run."""
    parts = []
    for run, steps in inputs.timelines.items():
        images = []
        for index, (seen, path) in enumerate(kept := _spread(steps, _MOST_STEPS)):
            last = index == len(kept) - 1
            images.append(_image(path, caption := f"after {format_number(seen)} images", _PIXELATED_SHEET, not last))
        title = f'<h3 class="name">{escape(run)}</h3>' if run else ""
        name = escape(f"Images seen by {run}" if run else "Images seen")
        slider = f'<input type="range" min="0" max="{len(kept) - 1}" value="{len(kept) - 1}" aria-label="{name}">'
        control = f"<label>{slider}<output>{caption}</output></label>"
        parts.append(f'<div class="card timeline">{title}{control}{"".join(images)}</div>')
    return "".join(['<p class="lead">Drag to go back in training.</p>', *parts]) if parts else ""


def speed(inputs: Inputs) -> str:
    """Images per second over training, and the seconds that each stage took."""
    series = [Series(run, colour, *image_rates(rows)) for colour, (run, rows) in enumerate(inputs.metrics.runs.items())]
    chart = line_chart("images/s", [one for one in series if one.images])
    stages = _part(inputs, "seconds", dict)
    largest = max((value for value in stages.values() if _is_number(value)), default=0) or 1
    items = "".join(
        f"<li><span>{escape(label(name))}</span>{_bar(value / largest) if _is_number(value) else '<span></span>'}"
        f"<b>{_duration(value) if _is_number(value) else MISSING}</b></li>"
        for name, value in stages.items()
    )
    table = f'<div class="card stages"><h3>Time by stage</h3><ul>{items}</ul></div>' if items else ""
    if not chart and not table:
        return ""
    legend = _legend(inputs) if chart else ""
    body = (
        f'<div class="beside">{table}{chart}</div>'
        if chart and table
        else table or f'<div class="panels">{chart}</div>'
    )
    return f'<div class="gap"></div>{legend}{body}'


def settings(inputs: Inputs) -> str:
    """The resolved config: one card for what stands at the top level and one for each group."""
    config = {key: value for key, value in (inputs.config or {}).items() if key != "environment"}
    plain = {key: value for key, value in config.items() if not isinstance(value, dict)}
    cards = [_definitions("General", plain)]
    cards += [_definitions(key, value) for key, value in config.items() if isinstance(value, dict)]
    return f'<div class="gap"></div><div class="pairs">{"".join(cards)}</div>' if any(cards) else ""


def image_rates(rows: list[Row]) -> tuple[list[float], list[float]]:
    """(images, images per second) between neighbouring rows; the clock starts anew at a resume, which gives no rate."""
    images, rates = [], []
    for before, after in itertools.pairwise(rows):
        seconds = after.seconds - before.seconds
        if seconds > 0:
            images.append(after.images)
            rates.append((after.images - before.images) / seconds)
    return images, rates


def _systems_table(inputs: Inputs) -> str:
    systems = _part(inputs, "systems", dict)
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
    key, floor = "frechet_to_teacher", _part(inputs, "floors", dict).get("teacher_vs_teacher")
    systems = {
        name: float(values[key])
        for name, values in _part(inputs, "systems", dict).items()
        if isinstance(values, dict) and _is_number(values.get(key))
    }
    floor = float(floor) if _is_number(floor) and math.isfinite(floor) and floor > 0 else None
    return dot_chart("Fréchet distance to the teacher", systems, floor)


def _cell(column: list[Any], index: int) -> str:
    value = column[index]
    numbers = [float(other) for other in column if _is_number(other) and math.isfinite(other)]
    if not _is_number(value) or not math.isfinite(value) or value in (0, None):
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
    for check in _checks(inputs):
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


def _checks(inputs: Inputs) -> list[dict[str, Any]]:
    return [check for check in _part(inputs, "checks", list) if isinstance(check, dict)]


def _part(inputs: Inputs, key: str, kind: type) -> Any:
    """result[key], empty where it is absent; UserError where it is of another kind."""
    value = (inputs.result or {}).get(key)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise UserError(f"{inputs.workdir / 'result.json'}: key {key!r} must be a JSON {kind.__name__}; write it again")
    return value


def _definitions(title: str, data: Mapping[str, Any], write: Callable[[Any], str] = scalar) -> str:
    items = "".join(f"<dt>{escape(key)}</dt><dd>{escape(write(value))}</dd>" for key, value in flatten(data))
    return f'<div class="card"><h3>{escape(title)}</h3><dl>{items}</dl></div>' if items else ""


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


def _spread(items: list, most: int) -> list:
    if len(items) <= most:
        return items
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def _image(path: Path | None, alt: str, pixelated: int, hidden: bool = False) -> str:
    if path is None:
        return f'<span class="absent">{MISSING}</span>'
    try:
        with Image.open(path) as image:
            image.load()
            size, data, kind = image.size, path.read_bytes(), image.format
            if len(data) > _LARGEST_PLAIN or kind != "PNG":
                buffer = io.BytesIO()
                image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
                image.convert("RGB").save(buffer, format="WEBP", quality=90)
                data, kind = buffer.getvalue(), "WEBP"
    except (OSError, SyntaxError) as error:  # SyntaxError is how Pillow says that a PNG is damaged
        raise UserError(f"{path}: not a readable image; draw it again or remove it") from error
    small = ' class="small"' if size[0] < pixelated else ""
    source = f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode('ascii')}"
    shape = f'width="{size[0]}" height="{size[1]}"'
    return f'<img{small} src="{source}" {shape} alt="{escape(alt)}"{" hidden" if hidden else ""}>'


def _bar(share: float) -> str:
    return f'<span class="bar"><i style="width:{100 * min(max(share, 0.0), 1.0):.1f}%"></i></span>'


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return format_number(seconds)
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
