"""Which platform a layer is traced for: the host's, unless a program is made for another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

ANY = "any"
"""For `compiling_for`: attention and convolutions as XLA's own operations, which every platform has."""

_PLATFORM: ContextVar[str | None] = ContextVar("platform", default=None)


@contextmanager
def compiling_for(name: str) -> Iterator[None]:
    """Layers traced inside are formulated for `name` ("cpu", "gpu", "tpu", `ANY`), whatever this host has.

    For export and ahead-of-time compilation. What `jax.jit` traced before stays as it is: make the function inside.
    """
    token = _PLATFORM.set(name)
    try:
        yield
    finally:
        _PLATFORM.reset(token)


def platform() -> str:
    """The platform of `compiling_for`, else `jax.default_backend()`."""
    return _PLATFORM.get() or jax.default_backend()
