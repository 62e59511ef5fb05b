"""Agreement between processes: two real ones, and the free path of one."""

import socket
import subprocess
import sys

import pytest

from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.processes import Vote, first_decides, is_first

# Process 1 hears of a stop at step 3, process 0 never does: both must leave after the same step. A refusal on process 0
# must reach both.
JOB = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]), initialization_timeout=60)
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.processes import Vote, first_decides, is_first
assert is_first() == (sys.argv[2] == "0")
vote = Vote()
stop = next(step for step in range(1, 100) if vote(15 if step >= 3 and not is_first() else 0) == 15)
def refuse():
    assert is_first()
    raise UserError("the workdir is in use: über")
first_decides(lambda: None)
try:
    first_decides(refuse)
except UserError as error:
    print(stop, error)
"""


def test_two_processes_agree_on_the_step_and_on_the_error():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    jobs = [
        subprocess.Popen([sys.executable, "-c", JOB, address, str(i)], stdout=-1, stderr=-1, text=True) for i in (0, 1)
    ]
    told = [job.communicate(timeout=300) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], told
    # Gloo greets on stdout.
    assert [out.splitlines()[-1] for out, _ in told] == ["3 the workdir is in use: über"] * 2


def test_one_process_decides_alone():
    assert is_first()
    assert [Vote()(number) for number in (0, 15)] == [0, 15]
    done = []
    first_decides(lambda: done.append(1))
    assert done == [1]

    def refuse():
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        first_decides(refuse)
