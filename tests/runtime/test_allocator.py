"""A command begins again with glibc's allocator told what to keep: once, as it was typed, and not where it must not."""

import importlib.util
import os
import subprocess
import sys
import types

import pytest

from d2g_jax.runtime import allocator

TYPED = """
import os, sys
from d2g_jax.runtime.allocator import VARIABLE, begin_again
print(os.getpid(), flush=True)
begin_again()
print(os.environ[VARIABLE], sys.argv[1:])
"""
ON_GLIBC = pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", ()), reason="no glibc here")


def typed(tmp_path, **variables):
    """What a script prints, a line for each time it began, that was given two arguments."""
    script = tmp_path / "typed.py"
    script.write_text(TYPED)
    environment = {name: value for name, value in os.environ.items() if name != allocator.VARIABLE}
    environment |= {"JAX_PLATFORMS": "cpu", **variables}
    command = [sys.executable, str(script), "--prompt=two words", "-v"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


@ON_GLIBC
def test_it_begins_again_once_as_the_same_process_with_its_arguments(tmp_path):
    first, second, end = typed(tmp_path)
    assert first == second
    cores = len(os.sched_getaffinity(0))
    assert end == f"{allocator.settings(cores)} ['--prompt=two words', '-v']"


@pytest.mark.parametrize("value", ["", "glibc.malloc.check=0"])
def test_a_variable_that_is_set_stays(value, tmp_path):
    _, end = typed(tmp_path, GLIBC_TUNABLES=value)
    assert end == f"{value} ['--prompt=two words', '-v']"


@ON_GLIBC
@pytest.mark.parametrize(
    ("plugin", "platforms", "begun"),
    [("", "", 1), ("jax_plugins", "", 0), ("libtpu", "", 0), ("libtpu", "cpu", 1), ("jax_plugins", "cuda", 0)],
)
def test_hosts_of_accelerators_are_left_alone(plugin, platforms, begun, monkeypatch):
    calls = []
    monkeypatch.setenv(allocator.VARIABLE, "put back afterwards, as it was")
    monkeypatch.delenv(allocator.VARIABLE)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: types.SimpleNamespace() if name == plugin else None)
    monkeypatch.setattr(os, "execv", lambda *command: calls.append(command))
    allocator.begin_again()
    assert len(calls) == begun
