"""Results on disk, found again by the hash of everything that they depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jaxlib

from d2g_jax.plan.targets import libtpu_version
from d2g_jax.runtime import atomic


def folder() -> Path:
    """Beside the compilation cache: JAX_COMPILATION_CACHE_DIR, else ~/.cache/d2g_jax."""
    base = os.environ.get("JAX_COMPILATION_CACHE_DIR") or Path.home() / ".cache" / "d2g_jax"
    return Path(base) / "plan"


def versions() -> dict[str, str | None]:
    """What compiles."""
    return {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "libtpu": libtpu_version()}


def source_hash() -> str:
    """SHA-256 over this package's Python files: another program may mean another plan."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()


def cached(key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The JSON object stored under `key`, or that of `make()`, which is then stored."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    file = folder() / f"{name}.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    value = make()
    atomic.write_text(file, json.dumps(value, indent=1) + "\n")
    return value
