"""How long jax has been compiling, by its own account."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax


class Compilation:
    """Of one thread, while it is counted: see `compilation`."""

    def __init__(self) -> None:
        self._thread, self._start = threading.get_ident(), time.monotonic()
        self._spans: list[tuple[float, float]] = []  # apart from each other, in order

    @property
    def seconds(self) -> float:
        """Tracing, lowering, compiling and reading from jax's cache, so far."""
        return sum(end - begin for begin, end in self._spans)

    def __call__(self, event: str, duration: float, **_: object) -> None:
        """What `jax.monitoring` calls in the thread where something ended that took `duration` seconds."""
        if not event.startswith("/jax/core/compile/") or threading.get_ident() != self._thread:
            return
        end = time.monotonic()
        begin = min(max(end - duration, self._start), end)  # jax's clock is the wall's, which may be set meanwhile
        while self._spans and self._spans[-1][0] >= begin:  # within this one: a function traced in another's trace
            self._spans.pop()
        if self._spans:
            begin = max(begin, self._spans[-1][1])
        self._spans.append((begin, end))


@contextmanager
def compilation() -> Iterator[Compilation]:
    """Counts the seconds that are spent within it by the thread that entered it."""
    counted = Compilation()
    jax.monitoring.register_event_duration_secs_listener(counted)
    try:
        yield counted
    finally:
        jax.monitoring.unregister_event_duration_listener(counted)
