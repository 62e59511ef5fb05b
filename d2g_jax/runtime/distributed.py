"""Several processes as one job: how they find each other, what they must agree on, and how all end when one does.

The environment says who takes part (docs/pods.md has the table): JAX's own three variables, SLURM, a TPU slice under
GKE, or `D2G_CLUSTER`, the name of one of JAX's detectors. A single process needs nothing, and all this is then free.

Once a job has begun, a thread of every process counts up a number in the coordinator's key-value store and looks at
those of the others. A process whose number stands still is taken for dead: the others would wait for ever in a
collective, so they end, and one of them says which it was. The store is JAX's own; its client is no public API, but the
only one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from typing import Any

import jax
from jax._src import distributed as runtime

from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.version import __version__

CLUSTERS = ("slurm", "gketpu", "gcetpu", "k8s", "ompi", "mpi4py")
"""What `D2G_CLUSTER` may be: JAX's names of its detectors."""

LOST = 75
"""Exit code when another process died: EX_TEMPFAIL, the same command goes on from the newest checkpoint."""

_ADDRESS, _COUNT, _ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_ALIVE, _SAID, _FACTS = "d2g/alive", "d2g/said", "d2g/facts"
_POLL_SECONDS = 5.0
_PATIENCE = 6  # polls without a sign of life; counted, not timed, so that a machine that slept accuses nobody
_HEARTBEAT_SECONDS = 50  # JAX's own watch, which aborts with a stack trace: for when ours gets no turn
_CONNECT_SECONDS = 300
_SILENT_SECONDS = 10
_joined, _stopped = threading.Event(), threading.Event()
_END_MILLISECONDS = 7 * 24 * 3600 * 1000


@dataclasses.dataclass(frozen=True)
class Place:
    """This process' place in a job: all three numbers from plain variables, or the detector that finds them."""

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    detector: str = "deactivate"


def find_place(environment: Mapping[str, str]) -> Place | None:
    """What `environment` says; None for a job of one process.

    Raises `UserError` for variables that are half set, contradict each other or are not numbers.
    """
    given = {name: environment[name] for name in (_ADDRESS, _COUNT, _ID) if environment.get(name)}
    if given.keys() == {_COUNT} and given[_COUNT] == "1":
        return None
    detector = environment.get("D2G_CLUSTER") or _detect(environment)
    if detector and detector not in CLUSTERS:
        raise UserError(f"D2G_CLUSTER={detector} is unknown; choose one of {', '.join(CLUSTERS)}")
    if detector and not given.keys() & {_COUNT, _ID}:
        return Place(coordinator=given.get(_ADDRESS), detector=detector)
    if not given:
        return None
    missing = [name for name in (_ADDRESS, _COUNT, _ID) if name not in given]
    if missing:
        raise UserError(f"{' and '.join(given)} set, {' and '.join(missing)} not: set all three, or none of them")
    if not given[_ADDRESS].rpartition(":")[2].isdigit():
        raise UserError(f"{_ADDRESS}={given[_ADDRESS]}: give HOST:PORT of process 0")
    for name in (_COUNT, _ID):
        if not given[name].isdigit():
            raise UserError(f"{name}={given[name]}: give a number")
    count, process = int(given[_COUNT]), int(given[_ID])
    if process >= count:
        raise UserError(f"{_ID}={process} with {_COUNT}={count}: processes are numbered from 0 to {count - 1}")
    return Place(given[_ADDRESS], count, process) if count > 1 else None


def _detect(environment: Mapping[str, str]) -> str | None:
    """A job that SLURM's `srun` or a GKE TPU slice made of more than one process."""
    # An interactive shell is a step of one task, whatever the job that it is in was given.
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1")
    if "SLURM_STEP_NODELIST" in environment and tasks != "1":
        return "slurm"
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    slices = environment.get("MEGASCALE_NUM_SLICES", "1")
    return "gketpu" if "," in workers or slices != "1" else None


def join() -> None:
    """Joins the other processes, if there are any; before any device is used.

    It comes first of all, before a config is read: from then on a process that fails alone takes the others along.
    Where they do not come together, this process says so after `_SILENT_SECONDS`, and ends after `_CONNECT_SECONDS`.

    Raises:
      UserError: the environment is half set, or not what the detector needs.
    """
    place = find_place(os.environ)
    if place is None or _client() is not None:
        return
    where = place.coordinator or place.detector
    # SIGTERM is the loop's, which makes all processes stop after the same step; JAX's service would swallow it.
    jax.config.update("jax_enable_preemption_service", False)
    waiting = threading.Timer(_SILENT_SECONDS, _wait, (place, where))
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process,
            cluster_detection_method=place.detector,
            initialization_timeout=_CONNECT_SECONDS + 60,  # JAX's own end is an abort with a stack trace
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{where}: the processes of this job did not come together: {reason}") from error
    finally:
        waiting.cancel()
        _joined.set()
    _show("0")
    threading.Thread(target=_watch, name="d2g watch", daemon=True).start()


def _wait(place: Place, where: str) -> None:
    """Says so, and ends this process where the others do not come."""
    who = "this process" if place.process is None else f"process {place.process} of {place.processes}"
    print(f"d2g: {where}: {who} waits for the others of this job", file=sys.stderr, flush=True)
    if _joined.wait(_CONNECT_SECONDS - _SILENT_SECONDS):
        return
    waited = f"waited {_CONNECT_SECONDS} s for the others of this job"
    print(f"d2g: {where}: {who} {waited}; look why one of them did not start", file=sys.stderr, flush=True)
    os._exit(LOST)


def start(facts: Mapping[str, Any]) -> None:
    """Joins the other processes unless that is done, and compares what they are about to do.

    Args:
      facts: what must be the same everywhere, such as the config with its keys joined by dots.

    Raises:
      UserError: as `join` does; or facts differ from those of process 0, then the same one in all processes.
    """
    join()
    client, count = _client(), runtime.global_state.num_processes
    if client is None:
        return
    own = {**facts, "jax": jax.__version__, "d2g_jax": __version__, "host": socket.gethostname()}
    client.key_value_set(f"{_FACTS}/{process_id()}", json.dumps(own))
    client.wait_at_barrier(_FACTS, _CONNECT_SECONDS * 1000)
    everyone = {int(key.rpartition("/")[2]): json.loads(text) for key, text in client.key_value_dir_get(_FACTS)}
    first = everyone[0]
    for process in range(1, count):
        mine = everyone[process]
        keys = sorted({*first, *mine} - {"host"})
        for key in keys:
            if first.get(key) != mine.get(key):
                raise UserError(
                    f"process {process} on {mine['host']} has {key}={mine.get(key)!r}, process 0 has "
                    f"{first.get(key)!r}; start all processes with the same command and the same code"
                )


def process_id() -> int:
    """This process' number, 0 where it is alone; unlike `jax.process_index` without using a device."""
    return runtime.global_state.process_id


def _client() -> Any:
    return runtime.global_state.client


def say(message: str) -> None:
    """One line on stderr: what all processes say is said by process 0 alone, what only one says names that one."""
    client, me = _client(), process_id()
    key = f"{_SAID}/{hashlib.sha256(message.encode(errors='replace')).hexdigest()}"
    if client is not None and me:
        try:
            client.blocking_key_value_get(key, int(2 * _POLL_SECONDS * 1000))
        except jax.errors.JaxRuntimeError:
            message = f"process {me}: {message}"  # process 0 has nothing of the kind to say, or is gone
        else:
            return
    elif client is not None:
        client.key_value_set(key, "", allow_overwrite=True)
    print(f"d2g: {message}", file=sys.stderr, flush=True)


def finish(code: int, message: str = "") -> int:
    """The job's end in this process: says `message`, waits for the others after success, takes them along otherwise.

    Returns `code`. With other processes a failure does not return: JAX's own farewell would wait for those that are
    stuck.
    """
    if message:
        say(message)
    client = _client()
    if client is None:
        return code
    if code == 0:
        client.wait_at_barrier("d2g/end", _END_MILLISECONDS)
        _stopped.set()
        return code
    _stopped.set()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator is gone, and all who could read this
        _show(f"failed {code} {message}")  # the others leave with the same code
    if process_id() == 0:
        _linger()  # the key-value store is here, and the others still read it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def crash() -> None:
    """For an `except` clause: with other processes, prints the exception, ends this process and takes them along.

    Where another process has died, a collective may fail here before the watch knows which: it gets the time to say so.
    Alone, this returns, and the exception is the caller's to raise.
    """
    if _client() is not None:
        traceback.print_exc()
        time.sleep((_PATIENCE + 1) * _POLL_SECONDS)
        finish(1, "ended by the exception above")


def _linger() -> None:
    """Returns when every other process has failed too, or is taken for dead."""
    others = runtime.global_state.num_processes - 1
    for _ in range(_PATIENCE):
        if sum(text.startswith("failed") for text in _look().values()) > others:
            break
        time.sleep(_POLL_SECONDS / 2)
    time.sleep(1.0)  # between their last word here and their end


def _show(text: str) -> None:
    """Tells the others how this process is."""
    _client().key_value_set(f"{_ALIVE}/{process_id()}", text, allow_overwrite=True)


def _look() -> dict[int, str]:
    """What every process last said of itself."""
    return {int(key.rpartition("/")[2]): text for key, text in _client().key_value_dir_get(_ALIVE)}


def _watch() -> None:
    """Shows that this process lives, and looks whether the others do, until `_stopped`."""
    beats, still, before = 0, {}, {}
    while not _stopped.wait(_POLL_SECONDS):
        beats += 1
        try:
            _show(str(beats))
            now = _look()
        except jax.errors.JaxRuntimeError:
            _leave(0, LOST, "does not answer any more")
            return  # stopped meanwhile
        still = {who: still.get(who, 0) + 1 if before.get(who) == text else 0 for who, text in now.items()}
        before = now
        for who, text in now.items():
            if text.startswith("failed") and still[who] >= 2:  # time to fail likewise, by ourselves
                _, code, *message = text.split(" ", 2)
                _leave(who, int(code), f"has ended: {''.join(message)}")
            if still[who] >= _PATIENCE:
                _leave(who, LOST, f"gave no sign of life for {_PATIENCE * _POLL_SECONDS:.0f} s")


def _leave(who: int, code: int, what: str) -> None:
    """Ends this process because of another; returns only where the watch was stopped meanwhile."""
    if _stopped.is_set():
        return
    first = 1 if who == 0 else 0
    if process_id() == first:
        count = runtime.global_state.num_processes
        print(
            f"d2g: process {who} of {count} {what}; all stop here, the same command goes on from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
    os._exit(code)
