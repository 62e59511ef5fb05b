"""`report.html` while its job is at work."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tqdm import tqdm

from d2g_jax.report.page import write_report
from d2g_jax.report.status import FINISHED, RUNNING, STOPPED, Status, read_status, write_status
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.interrupt import Terminated
from d2g_jax.runtime.processes import is_first

_REST = 50  # a page that took one second to write is written again after fifty at the earliest: 2% of the time


class LivePage:
    """A context around a job's work that keeps its page fresh; the first process alone writes.

    On leaving by an exception the page says what stopped the job. A page that cannot be written stops nothing: a line
    on stderr tells it once. The last page, of the finished job, is `finish`'s.

    Attributes:
      memory: GiB by place that the job knows of itself; see `Status`.
    """

    def __init__(self, workdir: Path, total: int, unit: str):
        self._workdir, self._total, self._unit = workdir, total, unit
        self._done, self._next, self._failed = 0, 0.0, False
        self.memory: dict[str, float] = {}

    def __enter__(self) -> LivePage:
        return self

    def __exit__(self, _: type[BaseException] | None, failure: BaseException | None, __: object) -> None:
        if failure is not None:
            self._failed = True  # what stopped the job is said in any case
            self._write(STOPPED, _reason(failure))

    def update(self, stage: str, done: int, *, at_once: bool = False) -> None:
        """Writes the page unless that would take more than 2% of the time; `at_once` writes it in any case."""
        self._done = done
        if at_once or time.monotonic() >= self._next:
            self._write(RUNNING, stage)

    def _write(self, state: str, stage: str) -> None:
        if not is_first():
            return
        start = time.monotonic()
        try:
            status = Status(state, stage, self._done, self._total, self._unit, memory=self.memory)
            write_status(self._workdir, status)
            write_report(self._workdir)
        except Terminated:  # raised by a signal while the page was written, and not about the page
            raise
        except Exception as error:  # of any kind: hours of training are worth more than the page about them
            if not self._failed:
                line = f"d2g: {self._workdir}: {_reason(error)}; the run goes on without its page"
                tqdm.write(line, file=sys.stderr)
            self._failed = True
        end = time.monotonic()
        self._next = end + _REST * (end - start)


def _reason(failure: BaseException) -> str:
    if isinstance(failure, UserError):
        return " ".join(str(failure).split())
    named = {KeyboardInterrupt: "interrupted", Terminated: "terminated by SIGTERM or the cloud"}
    return named.get(type(failure)) or " ".join(f"{type(failure).__name__}: {failure}".split())


def finish(workdir: Path, total: int, unit: str) -> Path:
    """Writes the page of a finished job and returns its path; raises `UserError` as `write_report` does.

    A job that was finished before keeps its status: its memory and time were those of the work.
    """
    before = read_status(workdir)
    if before is None or before.state != FINISHED or before.total != total:
        write_status(workdir, Status(FINISHED, "", total, total, unit, memory=before.memory if before else {}))
    return write_report(workdir)
