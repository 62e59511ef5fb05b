"""A run's folder: whose config it holds, and its metrics as JSON lines."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections

from d2g_jax.runtime import atomic
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.processes import is_first
from d2g_jax.runtime.version import __version__

_PLACE_KEYS = ("environment",)

FREE = (
    "train.images", "train.skip_nonfinite", "train.sample_every", "train.checkpoint_every", "train.keep_checkpoints",
    "train.keep_best", "train.tensorboard", "train.wandb", "train.compile_workers", "train.remat", "train.micro_batch",
    "train.r1_micro_batch", "optimization_level", "mesh", "pairs.batch_size", "pairs.lease_seconds", "pairs.skip_empty",
)  # fmt: skip
"""Settings and groups that may change when a run goes on: how long, where and how often, but not what is computed."""
_OFF = ("train.packed",)
"""Switches that runs from before they were there go on with as if they were off."""
_NAMED = 3  # differing settings in a message


def environment() -> dict[str, Any]:
    """Device and versions, as stored beside every number."""
    devices = jax.devices()
    return {
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "backend": jax.default_backend(),
        "processes": jax.process_count(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "d2g_jax": __version__,
    }


def claim(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Writes `workdir`/config.json, or checks that the one there is this config.

    Only what is in `FREE` may differ. Raises `UserError` that names the keys that do.
    """
    file = workdir / "config.json"
    mine = to_json(config)
    if file.exists():
        try:
            theirs = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file}: not JSON ({error}); choose another --workdir") from error
        if not isinstance(theirs, dict):
            raise UserError(f"{file}: holds a {type(theirs).__name__}, not a config; choose another --workdir")
        check_same(mine, theirs, file)
    atomic.write_json(file, {**mine, "environment": environment()})


def to_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as plain JSON values."""
    return json.loads(config.to_json())


def config_hash(config: ml_collections.ConfigDict) -> str:
    """Sixteen hex digits that are the same for two configs that `check_same` lets pass."""
    return hashlib.sha256(json.dumps(_bound(to_json(config)), sort_keys=True).encode()).hexdigest()[:16]


def check_same(mine: dict[str, Any], theirs: dict[str, Any], source: Path) -> None:
    """Raises `UserError` that names what differs between this config and that of `source`, beyond `FREE`."""
    mine, theirs = _bound(mine), _bound(theirs)
    keys = [key for key in [*mine, *(key for key in theirs if key not in mine)] if mine.get(key) != theirs.get(key)]
    if keys:
        named = ", ".join(f"{key}={theirs.get(key)!r} (this one has {mine.get(key)!r})" for key in keys[:_NAMED])
        more = f" and {len(keys) - _NAMED} other differences" if len(keys) > _NAMED else ""
        raise UserError(f"{source}: holds a run with {named}{more}; choose another --workdir")


def _bound(config: dict[str, Any]) -> dict[str, Any]:
    """What of a config a run is bound to, keys joined by dots."""
    flat = flatten({key: value for key, value in config.items() if key not in _PLACE_KEYS})
    # Whoever has pairs knows their teacher by its content (`records.check_fits`), wherever it lies.
    free = (*FREE, "pipeline") if "pairs" in config else FREE
    free = (*free, *(key for key in _OFF if not flat.get(key)))
    return {key: value for key, value in flat.items() if key not in free and key.split(".")[0] not in free}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def truncate_metrics(workdir: Path, images: int) -> None:
    """Drops lines past the checkpoint that a run resumes from, and a line that a killed run left half-written."""
    file = workdir / "metrics.jsonl"
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break  # only the last line of a killed run can be broken, and its step is done again
        if row["images"] <= images:
            kept.append(line + "\n")
    atomic.write_text(file, "".join(kept))


class MetricsLog:
    """Appends one JSON line per call of `write`, of the first process alone; a context manager.

    Attributes:
      before: the lines that were there.
      last: the newest line, an empty dict where there is none.
    """

    def __init__(self, workdir: Path, run: str):
        self._file = file = workdir / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self.before: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self.last = self.before[-1] if self.before else {}
        self._run, self._seconds = run, self.last.get("seconds", 0.0)
        self._start = time.monotonic()
        self._stream = file.open("a", encoding="utf-8") if is_first() else None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError):  # of a full disk: `write` has said it
                self._stream.close()

    def write(self, images: int, values: dict[str, Any]) -> None:
        """Writes `values`, all of them finite or None, behind the run's name, its images and its own clock."""
        seconds = round(self._seconds + time.monotonic() - self._start, 3)
        self.last = {"run": self._run, "images": images, "seconds": seconds, **values}
        if self._stream is not None:
            with atomic.writing(self._file):
                self._stream.write(json.dumps(self.last, allow_nan=False) + "\n")
                self._stream.flush()

    def sync(self) -> None:
        """Before a checkpoint: a bucket behind a mount keeps what was written only from here on."""
        if self._stream is not None:
            with atomic.writing(self._file):
                os.fsync(self._stream.fileno())
