"""Notices of Google Cloud that this machine is about to be taken away, as a TPU's maintenance or pre-emption is."""

from __future__ import annotations

import http.client
import logging
import os
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

HOST_VARIABLE = "GCE_METADATA_HOST"
"""The variable by which Google's own libraries are told of another metadata server."""
SECONDS_BETWEEN = 5.0
_QUIET = {"maintenance-event": "NONE", "preempted": "FALSE"}


@contextmanager
def maintenance_notices(notify: Callable[[str], None], every: float = SECONDS_BETWEEN) -> Iterator[None]:
    """A context in which a thread asks the metadata server; `notify` is called once, with what it said.

    Only on TPUs and where `GCE_METADATA_HOST` is set; elsewhere nothing is asked. A machine that is stopped also sends
    SIGTERM: this comes earlier. The keys are those of
    https://cloud.google.com/compute/docs/metadata/predefined-metadata-keys.
    """
    if jax.default_backend() != "tpu" and HOST_VARIABLE not in os.environ:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(notify, every, ended), name="maintenance notices", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _watch(notify: Callable[[str], None], every: float, ended: threading.Event) -> None:
    warned = False
    while not ended.is_set():
        try:
            notices = [f"{key} {value}" for key, quiet in _QUIET.items() if (value := _ask(key)) != quiet]
        except (OSError, http.client.HTTPException) as error:
            if not warned:
                logging.getLogger(__name__).warning("no maintenance notices: the metadata server fails (%s)", error)
            warned, notices = True, []
        if notices:
            notify(", ".join(notices))
            return
        ended.wait(every)


def _ask(key: str) -> str:
    host = os.environ.get(HOST_VARIABLE, "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    with urllib.request.urlopen(request, timeout=2.0) as answer:
        return answer.read().decode("ascii", "replace").strip()
