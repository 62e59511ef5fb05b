"""Seconds of compilation: nothing else is counted, nothing twice."""

import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest

from d2g_jax.runtime.compilation import Compilation, compilation


def test_compiling_is_counted_and_running_is_not():
    inner = jax.jit(lambda x: jnp.sin(x) @ x)
    function = jax.jit(lambda x: inner(x) + inner(x + 1).sum())  # a trace within a trace
    start = time.monotonic()
    with compilation() as counted:
        jax.block_until_ready(function(jnp.ones((3, 3))))
        first = counted.seconds
        assert 0 < first <= time.monotonic() - start
        x = jnp.ones((3, 3))
        before = counted.seconds
        jax.block_until_ready(function(x))
        assert counted.seconds == before
    jax.block_until_ready(jax.jit(lambda x: x - 3)(x))
    assert counted.seconds == before  # it counts no longer


TRACE, BACKEND = "/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/backend_compile_duration"


@pytest.mark.parametrize(
    ("ended", "seconds"),
    [
        ([(10, TRACE, 2), (11, TRACE, 4), (20, BACKEND, 5)], 9),  # the first lies within the second
        ([(10, TRACE, 2), (11, TRACE, 1.5)], 3),  # a clock that was set a little meanwhile
        ([(10, TRACE, 3600)], 5),  # and by an hour, either way: counting began at 5
        ([(10, TRACE, 2), (12, TRACE, -3600)], 2),
    ],
)
def test_nothing_is_counted_twice_and_nothing_from_before(monkeypatch, ended, seconds):
    clock = iter([5, *(end for end, _, _ in ended)])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    counted = Compilation()
    for _, event, duration in ended:
        counted(event, duration, fun_name="f")
        counted("/jax/checkpoint/write", 1.0)
    assert counted.seconds == seconds


def test_other_threads_are_not_counted():
    with compilation() as counted, ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: jax.block_until_ready(jax.jit(lambda x: x * 5)(jnp.ones(3)))).result()
    assert counted.seconds == 0
