"""A workdir belongs to one live run at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from d2g_jax.runtime.errors import UserError

LOCK = ".lock"


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """A context in which no other process may enter the same `workdir`.

    The kernel holds the lock (`flock`, on NFS too) and drops it when the process ends, however it ends, so a dead run
    never blocks a new one. WORKDIR/.lock stays; what it says of host, process and command is for the message alone.

    Raises:
      UserError: another run holds it; says which one, since when, and what to do. Also for an unwritable folder.
    """
    file = workdir / LOCK
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        stream = file.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{workdir}: cannot be written ({error.strerror}); choose a writable folder") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            remedy = "wait for it, stop it, or choose another --workdir"
            raise UserError(f"{workdir}: {_holder(stream)}; {remedy}") from error
        except OSError as error:
            warnings.warn(
                f"{file}: this file system knows no locks ({error.strerror}); see to it that one run at a time uses it",
                stacklevel=1,
            )
        _write(stream, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}))
        try:
            yield
        finally:
            _write(stream, "")


def _write(stream: IO[str], text: str) -> None:
    stream.truncate(0)
    stream.write(text)
    stream.flush()


def _holder(stream: IO[str]) -> str:
    """Who says to be at work here; a run that has just begun may not have said so yet."""
    stream.seek(0)
    try:
        holder = json.loads(stream.read())
    except ValueError:
        return "in use by another run"
    age = max(0, round(time.time() - holder["since"]))
    text = f"{age} s" if age < 120 else f"{age // 60} min" if age < 7200 else f"{age // 3600} h"
    here = holder["host"] == socket.gethostname()
    remedy = f" (kill {holder['pid']} stops it)" if here and sys.platform != "win32" else ""
    return f"in use by process {holder['pid']} on {holder['host']} for {text}{remedy}"
