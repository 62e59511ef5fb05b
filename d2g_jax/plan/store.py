"""Results on disk, found again by the hash of everything that they depend on."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jaxlib

from d2g_jax.inputs import places
from d2g_jax.plan.targets import libtpu_version
from d2g_jax.runtime import atomic
from d2g_jax.runtime.errors import UserError


def folder() -> Path | None:
    """Beside the compilation cache; None where nobody knows the home."""
    base = places.cache_folder()
    return base and base / "plan"


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
    file = (place := folder()) and place / f"{name}.json"
    if file and file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    value = make()
    try:
        if file:
            atomic.write_json(file, value, indent=1)
    except UserError as error:  # what is only kept for the next time must not lose what is done
        warnings.warn(f"the plan is not kept for the next time: {error}", stacklevel=2)
    return value
