"""How long jax has been compiling, by its own account."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax


class Compilation:
    """Of this process, while it is counted: see `compilation`."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []

    @property
    def seconds(self) -> float:
        """Tracing, lowering, compiling and reading from jax's cache, so far."""
        return sum(end - begin for begin, end in self._spans)

    def __call__(self, event: str, duration: float, **_: object) -> None:
        """What `jax.monitoring` calls when something has ended that took `duration` seconds."""
        if event.startswith("/jax/core/compile/"):
            end = time.monotonic()
            begin = end - duration
            while self._spans and self._spans[-1][1] > begin:  # it lies within: a function traced in another's trace
                self._spans.pop()
            self._spans.append((begin, end))


@contextmanager
def compilation() -> Iterator[Compilation]:
    """Counts the seconds that are spent within it."""
    counted = Compilation()
    jax.monitoring.register_event_duration_secs_listener(counted)
    try:
        yield counted
    finally:
        jax.monitoring.unregister_event_duration_listener(counted)
