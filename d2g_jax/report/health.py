"""How a healthy run looks: what a line of metrics.jsonl says about its steps, bands for it, and alarms with a cause.

docs/healthy.md has the bands beside measured curves. Everything here is a pure function of host values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d2g_jax.inputs.text import read_json

Values = dict[str, float | None]


def summary(steps: Sequence[tuple[int, Mapping[str, Mapping[str, Any]]]]) -> Values:
    """One value per metric over fetched `steps` (images after the step, metrics by update).

    A scalar's is the mean of its finite values, None if it has none; one of shape (2,), sum and count, is the total sum
    by the total count, and left out where nothing was counted. Ratios that bands speak of are added.
    """
    collected: dict[str, list[np.ndarray]] = {}
    for _, updates in steps:
        for metrics in updates.values():
            for name, value in metrics.items():
                collected.setdefault(name, []).append(np.asarray(value, np.float64))
    values: Values = {}
    for name, found in collected.items():
        finite = [value for value in found if np.all(np.isfinite(value))]
        if found[0].shape == (2,):
            total, count = np.sum(finite, axis=0) if finite else (0.0, 0.0)
            if count:
                values[name] = float(total / count)
        else:
            values[name] = math.fsum(finite) / len(finite) if finite else None
    return values | _ratios(values)


def _ratios(values: Values) -> Values:
    known = {name: value for name, value in values.items() if value is not None}
    found: Values = {}
    # A line may begin with an update that was not finite: then what the student drew is not known.
    if known.get("target_std") and {"latent_std", "latent_mean", "target_mean"} <= known.keys():
        found["latent_std_ratio"] = known["latent_std"] / known["target_std"]
        found["latent_shift"] = (known["latent_mean"] - known["target_mean"]) / known["target_std"]
    if known.get("gradient_regression") and "gradient_adversarial" in known:
        found["gradient_ratio"] = known["gradient_adversarial"] / known["gradient_regression"]
    if known.get("loss_discriminator") and "loss_r1" in known:
        found["r1_share"] = known["loss_r1"] / (known["loss_discriminator"] + known["loss_r1"])
    return found


@dataclasses.dataclass(frozen=True)
class Band:
    """Where a metric of a healthy run stays; infinite where a side is open. The texts name cause and remedy.

    It holds from the first line on that has the metric called `since`.
    """

    metric: str
    low: float = -math.inf
    high: float = math.inf
    below: str = ""
    above: str = ""
    since: str = ""

    def side(self, value: float) -> str:
        """ "low" or "high" when `value` is outside, "" when it is inside."""
        return "low" if value < self.low else "high" if value > self.high else ""


_FILE = read_json(Path(__file__).with_name("bands.json"), "install the package again")
BANDS = tuple(Band(**band) for band in _FILE["bands"])
"""Of every line of metrics.jsonl. A metric that a run does not have is not looked at. Before `loss_adversarial` D warms
up alone: it knows nothing yet and has no effect."""


class Watch:
    """Follows the lines of a run. `see` tells the alarms that are on after a line: names such as "r1_share high".

    A single line outside of a band may be chance: an alarm begins with the second in a row on the same side, and ends
    with the first inside. A line without the metric says nothing about it.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()):
        """`rows`: the lines so far."""
        self._outside: dict[str, tuple[str, int]] = {}
        for row in rows:
            self.see(row)

    def see(self, row: Mapping[str, Any]) -> list[str]:
        for band in BANDS:
            if row.get(band.metric) is not None and (not band.since or band.since in row):
                side = band.side(row[band.metric])
                before, lines = self._outside.pop(band.metric, ("", 0))
                if side:
                    self._outside[band.metric] = (side, lines + 1 if side == before else 1)
        return [f"{metric} {side}" for metric, (side, lines) in self._outside.items() if lines > 1]


def explain(alarm: str) -> str:
    """The cause and remedy of an alarm by its name."""
    causes = {
        f"{band.metric} {side}": text for band in BANDS for side, text in (("low", band.below), ("high", band.above))
    }
    return causes.get(alarm, "of another version; see its docs/healthy.md")
