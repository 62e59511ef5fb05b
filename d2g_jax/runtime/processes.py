"""What the processes of one job have to agree on; with one process, everything here is free."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from d2g_jax.runtime.errors import UserError

_LONGEST = 1000  # bytes of a message


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return jax.process_index() == 0


def first_decides(action: Callable[[], None]) -> None:
    """Runs `action` on the first process; its `UserError` is raised on all, so that none waits for one that has left.

    Every process must call this at the same point.
    """
    if jax.process_count() == 1:
        action()
        return
    message = ""
    if is_first():
        try:
            action()
        except UserError as error:
            message = str(error)
    told = np.zeros(_LONGEST, np.uint8)
    encoded = np.frombuffer(message.encode()[:_LONGEST], np.uint8)
    told[: len(encoded)] = encoded
    told = np.asarray(multihost_utils.broadcast_one_to_all(told)).astype(np.uint8)
    if told.any():
        raise UserError(told.tobytes().rstrip(b"\0").decode(errors="replace"))


class Vote:
    """The largest of the numbers that all processes give at the same step, known to all at the same later step.

    With several processes the numbers meet in a tiny collective behind each step, and the outcome is read `lag` steps
    later, when it has long been there: the host never waits for the devices. All processes must call it in step.
    """

    def __init__(self, lag: int = 2):
        self._pending: deque[jax.Array] = deque()
        # Simulated devices abort when the host runs ahead of them.
        self._lag = 0 if jax.default_backend() == "cpu" else lag
        mesh = Mesh(np.asarray(jax.devices()), ("all",))
        self._sharding = NamedSharding(mesh, P("all"))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))

    def __call__(self, number: int) -> int:
        if jax.process_count() == 1:
            return number
        mine = np.full(jax.local_device_count(), number, np.int32)
        self._pending.append(self._largest(jax.make_array_from_process_local_data(self._sharding, mine)))
        return int(self._pending.popleft()) if len(self._pending) > self._lag else 0
