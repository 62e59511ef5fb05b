"""Who makes which shard, where workers come and go: one small file per shard under way, with a lease.

A claim is made with O_EXCL, so one worker gets it, and is renewed by a thread while its shard is made. A claim that
nobody renewed for `lease_seconds`, or whose process on this very machine is gone, belongs to a dead worker and is
taken over. Claims only save work: a record is a pure function of the config, so two workers at one shard write the
same bytes, each under a temporary name of its own. Clocks of the machines should agree to within the lease.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import socket
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from d2g_jax import records
from d2g_jax.records.files import read_json, write_json
from d2g_jax.runtime import buckets
from d2g_jax.runtime.errors import UserError

FOLDER = "claims"
_RENEWALS = 4  # in the time of one lease
_LONGEST_WAIT = 5.0  # seconds between two looks at the others' claims


@dataclasses.dataclass(frozen=True)
class Claim:
    """The content of a claim file."""

    worker: str
    host: str
    pid: int
    time: float  # seconds since 1970, when it was made or last renewed


class Claims:
    """The claims of one worker on the shards of a folder: a context, which renews what it holds and gives it back.

    Args:
      folder: of the pairs; claims lie in its `claims/`.
      manifest: of that folder.
      lease_seconds: after which a claim that is not renewed is void; 0 makes no claims and takes every shard.
    """

    def __init__(self, folder: Path, manifest: records.Manifest, lease_seconds: float):
        if lease_seconds < 0:
            raise UserError(f"pairs.lease_seconds={lease_seconds}; 0 makes no claims, else seconds such as 120")
        self._pairs, self._manifest, self._lease = folder, manifest, lease_seconds
        self._folder = folder / FOLDER
        self._host, self._pid = socket.gethostname(), os.getpid()
        self.worker = f"{self._host}-{self._pid}-{secrets.token_hex(4)}"
        self._held: set[int] = set()
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._renew, name="claims", daemon=True)

    def __enter__(self) -> Claims:
        if self._lease:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._lease:
            self._thread.join()
        for shard in list(self._held):
            self.release(shard)

    def order(self, shards: Sequence[int], process_index: int, process_count: int) -> list[int]:
        """In which order to try shards: first this process' static part, then, with claims, the others'.

        Lone workers begin at a place of their own, so that they seldom meet.
        """
        if process_count > 1:
            mine = [shard for shard in shards if shard % process_count == process_index]
            return [*mine, *(shard for shard in shards if shard not in set(mine))] if self._lease else mine
        start = zlib.crc32(self.worker.encode()) % max(len(shards), 1) if self._lease else 0
        return [*shards[start:], *shards[:start]]

    def take(self, shards: Sequence[int]) -> Iterator[int]:
        """Claims shards one by one as they are asked for; those that are whole or others' are passed over."""
        for shard in shards:
            if records.is_whole(self._pairs, self._manifest, shard) or not self._claim(shard):
                continue
            if records.is_whole(self._pairs, self._manifest, shard):  # finished between the two looks
                self.release(shard)
                continue
            yield shard

    def release(self, shard: int) -> None:
        """Gives a claim back, unless another worker has taken it over."""
        with self._lock:
            if self._lease and (claim := self._read(shard)) is not None and claim.worker == self.worker:
                self._path(shard).unlink(missing_ok=True)
            self._held.discard(shard)  # last: a signal may come between the two, and leaving then tries again

    def wait(self) -> None:
        """Sleeps a little, before another look at what others hold."""
        time.sleep(min(_LONGEST_WAIT, self._lease / _RENEWALS) if self._lease else _LONGEST_WAIT)

    def clear(self) -> None:
        """Removes all claims: every shard is whole, and what is left was left by the dead."""
        if not self._folder.is_dir():
            return
        try:
            for path in self._folder.iterdir():
                path.unlink(missing_ok=True)
            if buckets.is_local(self._folder):  # a bucket has no folders
                self._folder.rmdir()
        except OSError as error:  # another worker clears at the same moment, or has just renewed its claim
            logging.getLogger(__name__).info("%s: kept (%s)", self._folder, error)

    def _claim(self, shard: int) -> bool:
        if not self._lease:
            return True
        with self._lock:
            if not self._create(shard):
                if not self._dead(shard):
                    return False
                write_json(self._path(shard), self._mine())  # of two that take over, the last has it
                claim = self._read(shard)
                if claim is None or claim.worker != self.worker:
                    return False
            self._held.add(shard)
            return True

    def _create(self, shard: int) -> bool:
        """Makes the claim file; False when there is one."""
        path = self._path(shard)
        if path.exists():
            return False
        if not buckets.is_local(path):  # no exclusive creation through fsspec: of two, the last has it
            write_json(path, self._mine())
            claim = self._read(shard)
            return claim is not None and claim.worker == self.worker
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("x").close()
        except FileNotFoundError:  # another worker has just cleared the folder: every shard is whole
            return False
        except OSError as error:
            if path.exists():  # another worker was faster
                return False
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); free space or choose a writable folder"
            ) from error
        write_json(path, self._mine())
        return True

    def _dead(self, shard: int) -> bool:
        """Whether nobody keeps this claim any more."""
        claim = self._read(shard)
        if claim is None:  # its maker has not filled it yet, or never will; in a bucket it would be whole
            if not buckets.is_local(self._folder):
                return True
            try:
                renewed = self._path(shard).stat().st_mtime
            except FileNotFoundError:
                return True
            return time.time() - renewed > self._lease
        if claim.host == self._host and not _runs(claim.pid):
            return True
        return time.time() - claim.time > self._lease

    def _renew(self) -> None:
        while not self._stop.wait(self._lease / _RENEWALS):
            with self._lock:
                held = list(self._held)
            for shard in held:
                with self._lock:
                    if shard not in self._held or self._stop.is_set():
                        continue
                    claim = self._read(shard)
                    if claim is not None and claim.worker != self.worker:
                        continue  # taken over while this worker slept: both write the same bytes
                    try:
                        write_json(self._path(shard), self._mine())
                    except UserError as error:  # the shard itself will say so if it lasts
                        logging.getLogger(__name__).warning("claim not renewed: %s", error)

    def _mine(self) -> Claim:
        return Claim(self.worker, self._host, self._pid, time.time())

    def _read(self, shard: int) -> Claim | None:
        """A claim, or None while its file is absent, empty or not one."""
        try:
            return read_json(self._path(shard), Claim)
        except UserError:
            return None

    def _path(self, shard: int) -> Path:
        return self._folder / f"{shard:05d}.json"


def _runs(pid: int) -> bool:
    """Whether a process of this machine is there; one that is not ours counts."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
