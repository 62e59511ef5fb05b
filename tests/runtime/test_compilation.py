"""Seconds of compilation: nothing else is counted, nothing twice."""

import time

import jax
import jax.numpy as jnp

from d2g_jax.runtime.compilation import compilation


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


def test_what_lies_within_another_span_is_counted_once(monkeypatch):
    clock = iter([10.0, 11.0, 20.0, 22.0])
    with compilation() as counted:
        monkeypatch.setattr(time, "monotonic", lambda: next(clock))
        counted("/jax/core/compile/jaxpr_trace_duration", 2.0)  # 8 to 10
        counted("/jax/core/compile/jaxpr_trace_duration", 4.0, fun_name="outer")  # 7 to 11
        counted("/jax/core/compile/backend_compile_duration", 5.0)  # 15 to 20
        counted("/jax/checkpoint/write", 2.0)
        monkeypatch.undo()
    assert counted.seconds == 9.0
