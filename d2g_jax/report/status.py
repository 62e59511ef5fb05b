"""What a job is doing now: `status.json` in its workdir, read by the page and by whoever else asks."""

from __future__ import annotations

import dataclasses
import resource
import sys
from datetime import UTC, datetime
from pathlib import Path

import jax

from d2g_jax.report.files import read_object
from d2g_jax.runtime.atomic import write_json
from d2g_jax.runtime.errors import UserError

FILE = "status.json"
RUNNING, STOPPED, FINISHED = "running", "stopped", "finished"
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Status:
    """One job at one moment.

    Attributes:
      state: running, stopped (it said so itself; a killed one stays at running) or finished.
      stage: what is being done, such as "training"; for a stopped job, why it stopped.
      done, total: units of the whole job; total 0 where there is nothing to count.
      unit: what is counted, "images" or "stages".
      written: when, ISO 8601 in UTC.
      memory: peak of this process in GiB by place, "host" and, where the device tells, "device" (the fullest of them);
        "steps", of training: what the compiler says that a device needs for the largest step.
    """

    state: str
    stage: str = ""
    done: int = 0
    total: int = 0
    unit: str = "images"
    written: str = ""
    memory: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def share(self) -> float:
        """How much of the job is done, 0 to 1."""
        return min(self.done / self.total, 1.0) if self.total else 0.0


def write_status(workdir: Path, status: Status) -> None:
    """Writes `workdir`/status.json with the time and the memory of now."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    stamped = dataclasses.replace(status, written=now, memory=status.memory | peak_memory())
    write_json(workdir / FILE, dataclasses.asdict(stamped), indent=1, ensure_ascii=False)


def read_status(workdir: Path) -> Status | None:
    """What status.json says, None where there is none; raises `UserError` for a file that is not one."""
    path = workdir / FILE
    data = read_object(path)
    if data is None:
        return None
    try:
        status = Status(**data)
        datetime.fromisoformat(status.written)
        fit = status.state in (RUNNING, STOPPED, FINISHED) and status.done >= 0 and status.total >= 0
        fit = fit and all(value >= 0 for value in status.memory.values())
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a status ({error}); remove it") from error
    if not fit:
        raise UserError(f"{path}: not a status (state {status.state!r}, {status.done} of {status.total}); remove it")
    for name in ("stage", "unit"):
        if not isinstance(value := getattr(status, name), str):
            raise UserError(f"{path}: not a status ({name} {value!r} is no text); remove it")
    return status


def peak_memory() -> dict[str, float]:
    """Peak memory of this process so far in GiB: "host" (resident), and "device" where the backend counts it."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    peaks = {"host": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB, 2)}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    used = [one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one]
    return peaks | ({"device": round(max(used) / _GIB, 2)} if used else {})
