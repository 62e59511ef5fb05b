"""Ctrl-C and SIGTERM as requests: the step under way is finished and saved, and only then does the job end.

An exception out of nowhere would strike in the middle of a checkpoint's start, and Orbax may then wait for ever.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType
from typing import Any

_MOMENT = 0.05  # seconds


class Terminated(Exception):
    """SIGTERM came, as before a pre-emption; what was done has been saved. The `d2g` command exits with 143."""


def terminating() -> AbstractContextManager[None]:
    """A context in which SIGTERM raises `Terminated`, as Ctrl-C raises `KeyboardInterrupt`; for jobs of whole files.

    Off the main thread, where Python handles no signals, it does nothing.
    """

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    return _on_sigterm(terminate)


def leaving_at_once() -> AbstractContextManager[None]:
    """A context in which SIGTERM ends the process at once, with the code and the line of `Terminated`.

    For the time before the first step: nothing is lost, and an exception would have to wait until XLA has compiled what
    it is compiling, which may take longer than the time that is left. Off the main thread it does nothing.
    """

    return _on_sigterm(_leave)


@contextmanager
def starting() -> Iterator[None]:
    """A context in which Ctrl-C ends the process at once, until `started`: while jax is imported, one of its callbacks
    would swallow the exception. Nothing has been begun, so nothing is lost. Off the main thread it does nothing.
    """
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        started()


def started() -> None:
    """From here on Ctrl-C raises `KeyboardInterrupt`, as ever."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def ended() -> None:
    """From here on, while Python clears up, Ctrl-C ends the process: an exception there changes no exit code."""
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave_after)


def leave(code: int) -> None:
    """Ends the process, but leaves out Python's own end, in which jax crashes when it was stopped while it traced."""
    with suppress(OSError):  # nobody may read any more
        sys.stdout.flush()
    os._exit(code)


def interrupt_again() -> None:
    """Ctrl-C once more, in a moment: at once it would be lost where the first was."""
    main = threading.main_thread().ident
    threading.Timer(_MOMENT, lambda: signal.pthread_kill(main, signal.SIGINT)).start()


def _leave(number: int, frame: FrameType | None) -> None:
    began = number != signal.SIGINT  # which ends it here while jax is imported, whatever the job
    text = "terminated; the same command goes on from here" if began else "interrupted before anything was begun"
    _exit(number, text)


def _leave_after(number: int, frame: FrameType | None) -> None:
    _exit(number, "interrupted after the job's end")


def _exit(number: int, text: str) -> None:
    print(f"d2g: {text}", file=sys.stderr, flush=True)
    os._exit(128 + number)


@contextmanager
def _on_sigterm(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        _restore(signal.SIGTERM, before)


def _restore(number: int, handler: Any) -> None:
    """A handler that Python does not know, as that of jax.distributed, cannot be put back: None stands for it."""
    signal.signal(number, signal.SIG_DFL if handler is None else handler)


class StopRequests:
    """A context in which the first SIGINT or SIGTERM is only remembered; a second SIGINT interrupts at once.

    Off the main thread, where Python handles no signals, it does nothing.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # A job that a shell started in the background ignores SIGINT, and goes on doing so.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            _restore(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number
        text = "Ctrl-C again stops at once" if number == signal.SIGINT else "SIGTERM"
        print(f"d2g: saving after this step ({text})", file=sys.stderr, flush=True)

    def terminate(self, reason: str) -> None:
        """As if SIGTERM had come; for notices that come otherwise. May be called from any thread."""
        if self._signal is None:
            self._signal = int(signal.SIGTERM)
            print(f"d2g: saving after this step ({reason})", file=sys.stderr, flush=True)

    @property
    def signal(self) -> int:
        """Number of the signal that has come; 0 for none."""
        return self._signal or 0

    @property
    def stop(self) -> bool:
        """Whether a signal has come."""
        return self._signal is not None

    def leave(self, number: int | None = None) -> None:
        """Raises what signal `number` (None: the one that came) stands for: `KeyboardInterrupt` or `Terminated`."""
        raise KeyboardInterrupt if (number or self._signal) == signal.SIGINT else Terminated
