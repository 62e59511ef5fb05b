"""A workdir has one live run: refused while it lives, taken over when it is dead."""

import json
import os
import signal
import subprocess
import sys

import pytest

from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.lock import LOCK, locked

HOLD = """
import sys, time, pathlib
from d2g_jax.runtime.lock import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_live_run_keeps_others_out_and_a_dead_one_does_not(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        try:
            expected = rf"in use by process {holder.pid} on \S+ for \d+ s \(kill {holder.pid} stops it\); .* --workdir"
            with pytest.raises(UserError, match=expected) as refused, locked(tmp_path):
                pass
            assert "\n" not in str(refused.value)
        finally:
            holder.send_signal(signal.SIGKILL)
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_the_lock_goes_with_its_context(tmp_path):
    with locked(tmp_path / "new"), pytest.raises(UserError, match=f"process {os.getpid()}"), locked(tmp_path / "new"):
        pass
    with locked(tmp_path / "new"):
        pass


def test_unwritable_workdir(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose a writable folder"), locked(tmp_path / "file"):
        pass
