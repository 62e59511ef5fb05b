"""What a run writes down as it goes: lines of metrics with their alarms, and checkpoints to go on from."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from d2g_jax.report import health
from d2g_jax.runtime import runs
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.processes import is_first
from d2g_jax.train import guard
from d2g_jax.train.checkpoint import Checkpoints
from d2g_jax.train.state import TrainState
from d2g_jax.train.trackers import open_trackers

Steps = list[tuple[int, dict[str, dict[str, Any]]]]
"""Per step the images seen after it, and its metrics by update; on the devices, on the host, or read from JSON."""


class NotFinite(UserError):
    """An update was not finite and none may be left out (any more). The state before it has been saved."""


class Journal:
    """Metrics stay on the devices until a line or a checkpoint is due: the host never waits for a single step.

    A checkpoint also holds the metrics of the steps since the last line, so that a resumed run's lines are those of an
    uninterrupted one.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        workdir: Path,
        checkpoints: Checkpoints,
        metadata: dict[str, Any],
        say: Callable[[str], None],
    ):
        self._config, self._workdir, self._checkpoints = config, workdir, checkpoints
        self._metadata = {**metadata, "config": runs.to_json(config), "config_hash": runs.config_hash(config)}
        self._say = say if is_first() else lambda text: None
        resumed = checkpoints.latest() is not None
        self._pending: Steps = []  # on the devices
        self._steps: Steps = checkpoints.metadata()["since_last_line"] if resumed else []  # on the host
        self._left_out = self._describe(guard.bad_updates(self._steps))
        self._log = runs.MetricsLog(workdir, config.name)
        self._watch = health.Watch(self._log.before)
        self._trackers = open_trackers(config, workdir, self._log.last.get("images", 0)) if is_first() else []

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *failure: Any) -> None:
        self._log.__exit__(*failure)
        for tracker in self._trackers:
            tracker.close()

    def add(self, images: int, metrics: dict[str, dict[str, jax.Array]]) -> None:
        """Takes the device metrics of the step that ended at `images`, without waiting for them."""
        self._pending.append((images, metrics))

    def write_line(self, images: int, state: TrainState, counts: dict[str, float]) -> None:
        """Writes one line of means over the steps since the last, and says which alarms begin or end with it.

        Of `counts`, figures of the state itself, those that are not finite are None, as JSON knows no others.

        Raises `NotFinite` after saving `state` when an update stopped the run.
        """
        self._fetch(state)
        finite = {name: value if math.isfinite(value) else None for name, value in counts.items()}
        line = {**health.summary(guard.without_outcomes(self._steps)), **finite}
        before, alarms = self._log.last.get("alarms", []), self._watch.see(line)
        self._write(images, line, {"alarms": alarms, "left_out": self._left_out})
        self._check_best(line)
        self._steps, self._left_out = [], []
        self._announce(images, alarms, before)

    def add_picture(self, images: int, file: Path) -> None:
        """Hands a sample grid, a PNG that is there, on to the trackers."""
        for tracker in self._trackers:
            tracker.add_picture(images, file)

    def save(self, state: TrainState) -> None:
        """Starts a checkpoint. Raises `NotFinite` as `write_line` does."""
        self._fetch(state)
        self._save(state)

    def _save(self, state: TrainState) -> None:
        self._log.sync()
        seen = int(state.images)
        metadata = {
            **self._metadata,
            "step": int(state.step),
            "images": seen,
            "since_last_line": _to_json(self._steps, seen),
            "environment": runs.environment(),
        }
        keep_best = self._config.train.keep_best
        self._checkpoints.save(state, metadata, self._log.last.get(keep_best) if keep_best else None)

    def _fetch(self, state: TrainState) -> None:
        """Brings metrics to the host; says what was left out, and stops if that was one update too many."""
        fresh = jax.device_get(self._pending)
        self._steps, self._pending = self._steps + fresh, []
        bad = guard.bad_updates(fresh)
        if bad and bad[-1].stops:
            self._stop(bad[-1], state)
        for text in self._describe(bad):
            self._left_out.append(text)
            self._say(f"d2g: left out {text}")

    def _write(self, images: int, values: health.Values, said: dict[str, Any]) -> None:
        self._log.write(images, {**values, **said})
        for tracker in self._trackers:
            tracker.add_line(images, values)

    def _describe(self, bad: list[guard.BadUpdate]) -> list[str]:
        return [one.describe(self._config.train.batch_size) for one in bad]

    def _stop(self, bad: guard.BadUpdate, state: TrainState) -> None:
        t = self._config.train
        problem = bad.describe(t.batch_size)
        self._save(state)
        self._checkpoints.wait()
        done = [step for step in self._steps if step[0] <= bad.images]
        line = health.summary(guard.without_outcomes(done))
        self._write(bad.images, line, {"alarms": [], "left_out": self._left_out, "problem": problem})
        raise NotFinite(
            f"{self._workdir}: {problem}; the state before it is checkpoint {int(state.images)}. Lower a learning rate "
            f"in another --workdir, or leave such updates out with --config.train.skip_nonfinite={t.skip_nonfinite + 1}"
        )

    def _check_best(self, line: dict[str, Any]) -> None:
        name = self._config.train.keep_best
        if name and name not in line:
            known = ", ".join(sorted(key for key, value in line.items() if isinstance(value, float)))
            raise UserError(f"train.keep_best={name!r} is not in the lines of metrics.jsonl; choose of {known}")

    def _announce(self, images: int, alarms: list[str], before: list[str]) -> None:
        for alarm in alarms:
            if alarm not in before:
                value = self._log.last[alarm.split()[0]]
                self._say(f"d2g: alarm after {images} images: {alarm} ({value:.4g}): {health.explain(alarm)}")
        for alarm in before:
            if alarm not in alarms:
                self._say(f"d2g: alarm over after {images} images: {alarm}")


def _to_json(steps: Steps, images: int) -> list[Any]:
    """The steps that are part of a state that has seen `images`, without updates that it has not got."""
    done = (guard.APPLIED, guard.LEFT_OUT)
    return [
        [
            seen,
            {
                update: {name: np.asarray(value).tolist() for name, value in metrics.items()}
                for update, metrics in updates.items()
                if int(metrics[guard.OUTCOME]) in done
            },
        ]
        for seen, updates in steps
        if seen <= images
    ]
