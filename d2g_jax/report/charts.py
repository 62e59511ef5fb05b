"""Small line charts as inline SVG: pure functions from numbers to text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 196
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 24
COLOURS = 6  # CSS variables --run-0 ... --run-5; further runs use them again, dashed
_BINS = 160  # points drawn per line: more than a panel has room for would only make the file larger
_LOG_SPAN = 100.0  # a positive quantity that spans more than two decades is drawn on a logarithmic axis
MISSING = "–"


@dataclass(frozen=True)
class Series:
    """One run's values of one quantity. `colour` is the run's index, the same in every panel."""

    name: str
    colour: int
    images: Sequence[float]
    values: Sequence[float]  # NaN and infinities are gaps

    def finite(self) -> list[tuple[float, float]]:
        return [(x, y) for x, y in zip(self.images, self.values, strict=True) if math.isfinite(y)]


@dataclass(frozen=True)
class Point:
    images: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Axis:
    """Maps [low, high] to [start, stop] in SVG units, linearly or by logarithm."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.start + min(max(part, 0.0), 1.0) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        return _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)


def format_number(value: object) -> str:
    """A number as people write it: three or four figures that matter, thousands separated, an en dash for None."""
    if value is None:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if float(value).is_integer() and abs(value) < 1e15:
        text = f"{int(value):,}"
    elif abs(value) >= 1000:
        text = f"{value:,.0f}"
    elif abs(value) >= 1e-3:
        text = f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    else:
        text = f"{value:.2e}"
    return text.replace("-", "−")


def short_number(value: float) -> str:
    """A number for an axis: 12k, 1.5M, 0.02."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}".replace("-", "−")
    text = f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")
    return text.replace("-", "−")


def line_chart(
    title: str, series: Sequence[Series], band: tuple[float, float] | None = None, since: float = 0.0
) -> str:
    """One panel: a line per run over images seen, with `band` (low, high) shaded where a healthy run stays.

    The band holds from image `since` on; either side may be infinite.
    More values than a panel can show are averaged in bins, with their extremes shaded behind. The axis is logarithmic
    where all values are positive and span more than two decades. Returns "" when no value is finite.
    """
    finite = [(one, one.finite()) for one in series]
    values = [y for _, pairs in finite for _, y in pairs]
    if not values:
        return ""
    last_images = max(x for _, pairs in finite for x, _ in pairs)
    x_axis = Axis(0.0, max(last_images, 1.0), LEFT, WIDTH - RIGHT)
    y_axis = _y_axis(values, band)
    parts = [_frame(x_axis, y_axis)]
    if band and since <= last_images:
        # A run's first line speaks of the images before it too.
        start = LEFT if since <= min(x for _, pairs in finite for x, _ in pairs) else x_axis(since)
        top, bottom = y_axis(band[1]), y_axis(max(band[0], y_axis.low) if y_axis.log else band[0])
        width, height = WIDTH - RIGHT - start, max(bottom - top, 1)
        box = f'x="{start:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}"'
        parts.append(f'<rect class="band" {box}/>')
    parts += [_line(one, x_axis, y_axis) for one, pairs in finite if pairs]
    label = "; ".join(f"{one.name or 'run'} ends at {format_number(pairs[-1][1])}" for one, pairs in finite if pairs)
    remarks = _remarks(finite, y_axis, band, since)
    return (
        f'<figure class="panel"><figcaption><h3>{escape(title)}</h3>{remarks}</figcaption>'
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}: {label}")}">'
        f'{"".join(parts)}<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg></figure>'
    )


def format_band(low: float, high: float) -> str:
    """`0.8 to 1.25`, `above −0.02`, `below 1`."""
    if math.isinf(low):
        return f"below {format_number(high)}"
    return f"above {format_number(low)}" if math.isinf(high) else f"{format_number(low)} to {format_number(high)}"


def _remarks(
    finite: Sequence[tuple[Series, list[tuple[float, float]]]],
    axis: Axis,
    band: tuple[float, float] | None,
    since: float,
) -> str:
    remarks = []
    gaps = sum(len(one.values) - len(pairs) for one, pairs in finite)
    if gaps:
        remarks.append(f'<span class="bad">{gaps} not finite</span>')
    if band:
        ends = {one.name: pairs[-1] for one, pairs in finite if pairs}
        outside = [name for name, (x, y) in ends.items() if x >= since and not band[0] <= y <= band[1]]
        extent = format_band(*band)
        who = "" if len(finite) == 1 else outside[0] if len(outside) == 1 else f"{len(outside)} runs"
        bad = f'<span class="bad">{escape(who)} outside, healthy {extent}</span>'
        remarks.append(bad if outside else f"<span>healthy {extent}</span>")
    if axis.log:
        remarks.append("<span>log</span>")
    if len(finite) == 1 and finite[0][1]:
        remarks.append(f"<b>{format_number(finite[0][1][-1][1])}</b>")
    return f'<span class="remarks">{"".join(remarks)}</span>' if remarks else ""


def _y_axis(values: Sequence[float], band: tuple[float, float] | None) -> Axis:
    low, high = min(values), max(values)
    if low > 0 and high / low > _LOG_SPAN:
        return Axis(low / 1.2, high * 1.2, HEIGHT - BOTTOM, TOP, log=True)
    if band:
        ends = [low, high, *filter(math.isfinite, band)]
        low, high = min(ends), max(ends)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    if 0 <= low < 0.35 * high:  # near enough to zero to start there, so that heights can be compared
        return Axis(0.0, high + margin, HEIGHT - BOTTOM, TOP)
    return Axis(low - margin, high + margin, HEIGHT - BOTTOM, TOP)


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    return [10.0**power for power in decades][:: max(1, len(decades) // 5)]


def _frame(x_axis: Axis, y_axis: Axis) -> str:
    parts = []
    for tick in y_axis.ticks():
        y = y_axis(tick)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{short_number(tick)}</text>')
    for tick in x_axis.ticks():
        x = x_axis(tick)
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 7}" text-anchor="{anchor}">{short_number(tick)}</text>')
    return "".join(parts)


def _line(series: Series, x_axis: Axis, y_axis: Axis) -> str:
    name, style = escape(series.name), f"--run:var(--run-{series.colour % COLOURS})"
    dash = ' stroke-dasharray="5 3"' if series.colour >= COLOURS else ""
    parts = []
    for points in _stretches(series):
        at = [(x_axis(point.images), point) for point in points]
        if any(point.high > point.low for point in points):
            upper = [f"{x:.1f},{y_axis(point.high):.1f}" for x, point in at]
            lower = [f"{x:.1f},{y_axis(point.low):.1f}" for x, point in reversed(at)]
            parts.append(f'<polygon class="extent" points="{" ".join(upper + lower)}"/>')
        places = " ".join(f"{x:.1f},{y_axis(point.mean):.1f}" for x, point in at)
        images = " ".join(f"{point.images:.0f}" for point in points)
        means = " ".join(f"{point.mean:.4g}" for point in points)
        data = f'data-run="{name}" data-images="{images}" data-values="{means}"'
        if len(points) == 1:
            x, y = places.split(",")
            parts.append(f'<circle class="dot" cx="{x}" cy="{y}" r="2.2"/>')
        parts.append(f'<polyline class="line" points="{places}" {data}{dash}/>')
    return f'<g style="{style}">{"".join(parts)}</g>'


def _stretches(series: Series) -> Iterator[list[Point]]:
    """Runs of finite values, each thinned: a NaN breaks the line rather than being bridged."""
    width = max(1, math.ceil(len(series.values) / _BINS))
    stretch: list[tuple[float, float]] = []
    for pair in [*zip(series.images, series.values, strict=True), (math.nan, math.nan)]:
        if math.isfinite(pair[1]):
            stretch.append(pair)
        elif stretch:
            yield [_bin(stretch[start : start + width]) for start in range(0, len(stretch), width)]
            stretch = []


def _bin(pairs: Sequence[tuple[float, float]]) -> Point:
    values = [y for _, y in pairs]
    return Point(pairs[-1][0], math.fsum(values) / len(values), min(values), max(values))
