"""Progress of a long job: a bar on a terminal, plain lines elsewhere; both show rate and time left.

Of several processes the first one shows its own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from d2g_jax.runtime import distributed

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10.0
_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}{postfix}]"
"""Without tqdm's own rate, which counts what comes before the first batch."""


class Progress:
    """A context manager; `advance` counts units done, all of a batch at once.

    The rate is that between the first batch and the last: what comes before, which `beginning` names ("compiling"), and
    what comes after have no part in it, nor has what an earlier run did. Behind a `beginning` a single batch has none.
    """

    def __init__(self, label: str, total: int, unit: str, done: int = 0, beginning: str = ""):
        self._label, self._total, self._unit = label, total, unit
        self._done, self._note = done, beginning
        self._begins_at_once = not beginning
        self._last_line = time.monotonic()
        self._start = self._first = self._latest = (self._last_line, done)  # when, and how much was done then
        self._shown = distributed.process_id() == 0
        terminal = self._shown and sys.stderr.isatty()
        self._bar = tqdm(desc=label, total=total, initial=done, unit=unit, bar_format=_BAR) if terminal else None

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.set_postfix_str(self._pace())
        elif self._note:
            self._line()
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif failure is None:
            self._line()

    def advance(self, units: int = 1, note: str = "", *, made: bool = True) -> None:
        """Counts `units` more; `note`, until there is another, is shown behind the rate. Not `made`: were there."""
        now, first = time.monotonic(), self._first is self._start
        self._done += units
        begun = first and (made or self._done == self._total)
        self._note = note or ("" if begun else self._note)
        if units:
            self._latest = (now, self._done)
            self._first = self._latest if first or not made else self._first
            self._start = self._start if made else self._latest
        if self._bar is not None:
            self._bar.set_postfix_str(self._pace(), refresh=False)
            self._bar.update(units)
        elif self._done < self._total and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._line()  # the last line is that of the end

    def say(self, text: str) -> None:
        """A line of its own, which the bar makes room for."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def leave_out(self, units: int) -> None:
        """`units` of the total need not be done here any more: another process did them."""
        self._total -= units
        if self._bar is not None:
            self._bar.total = self._total
            self._bar.refresh()

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """Passes `items` on, counting one unit each."""
        for item in items:
            yield item
            self.advance()

    def _line(self) -> None:
        self._last_line = time.monotonic()
        if not self._shown:
            return
        text, pace = f"{self._label}: {self._done}/{self._total} {self._unit}", self._pace()
        print(f"{text}, {pace}" if pace else text, file=sys.stderr, flush=True)

    def _pace(self) -> str:
        """Rate, time left and note, as far as there are any."""
        since, before = self._start if self._first is self._latest else self._first
        finished, parts = self._done == self._total, [self._note] if self._note else []
        if self._done > before and (self._first is not self._latest or (finished and self._begins_at_once)):
            rate = (self._done - before) / max(self._latest[0] - since, 1e-9)
            parts = [f"{rate:.1f} {self._unit}/s", f"{(self._total - self._done) / rate:.0f} s left", *parts]
        return ", ".join(parts)
