"""A run's folder: whose config it holds, and its metrics as JSON lines."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections

import d2g_jax
from d2g_jax import atomic
from d2g_jax.errors import UserError

_PLACE_KEYS = ("environment",)


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
        "d2g_jax": d2g_jax.__version__,
    }


def claim(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Writes `workdir`/config.json, or checks that the one there is this config.

    Only `train.images` may differ: a run may be made longer. Raises `UserError` that names the first key that differs.
    """
    file = workdir / "config.json"
    mine = json.loads(config.to_json())
    if file.exists():
        try:
            theirs = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file}: not JSON ({error}); choose another --workdir") from error
        for key, (here, there) in _differences(mine, theirs).items():
            if key not in ("train.images",):
                raise UserError(
                    f"{file}: holds a run with {key}={there!r}, this one has {here!r}; choose another --workdir"
                )
    atomic.write_text(file, json.dumps({**mine, "environment": environment()}, indent=2) + "\n")


def _differences(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    mine, theirs = flatten(mine), flatten({k: v for k, v in theirs.items() if k not in _PLACE_KEYS})
    keys = [*mine, *(key for key in theirs if key not in mine)]
    return {key: (mine.get(key), theirs.get(key)) for key in keys if mine.get(key) != theirs.get(key)}


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
    """Appends one JSON line per call of `write`: the newest metrics, fetched from the devices only then."""

    def __init__(self, workdir: Path, run: str, images: int):
        file = workdir / "metrics.jsonl"
        self._run, self._latest = run, (images, {})
        rows = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self._before = json.loads(rows[-1])["seconds"] if rows else 0.0
        self._start = time.monotonic()
        self._stream = file.open("a", encoding="utf-8")

    def add(self, images: int, metrics: dict[str, jax.Array]) -> None:
        """Keeps device scalars without waiting for them; the newest of each name since the last line is written."""
        self._latest = images, self._latest[1] | metrics

    def write(self) -> str | None:
        """Writes the newest values. Returns what is wrong when one is not finite, naming the image count and metric."""
        images, metrics = self._latest
        self._latest = images, {}
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        seconds = round(self._before + time.monotonic() - self._start, 3)
        row = {"run": self._run, "images": images, "seconds": seconds, **values}
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        return f"{', '.join(broken)} is not finite after {images} images" if broken else None

    def close(self) -> None:
        self._stream.close()
