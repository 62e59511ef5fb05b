"""Which processes make up a job, by the environment."""

import threading

import jax
import pytest

from d2g_jax.runtime import distributed
from d2g_jax.runtime.distributed import Place, find_place
from d2g_jax.runtime.errors import UserError

ADDRESS, COUNT, ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
SLURM = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({COUNT: "1"}, None),
        ({ADDRESS: "host:12", COUNT: "1", ID: "0"}, None),
        ({ADDRESS: "host:12", COUNT: "4", ID: "3"}, Place("host:12", 4, 3)),
        ({ADDRESS: "[::1]:12", COUNT: "2", ID: "0"}, Place("[::1]:12", 2, 0)),
        (SLURM, Place(detector="slurm")),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        ({**SLURM, COUNT: "1"}, None),  # an interactive shell inside an allocation
        ({**SLURM, "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, None),  # the same, told by SLURM alone
        ({**SLURM, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "2"}, Place(detector="slurm")),
        ({**SLURM, "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, Place(detector="slurm")),
        ({**SLURM, ADDRESS: "host:12"}, Place("host:12", detector="slurm")),
        ({**SLURM, ADDRESS: "host:12", COUNT: "4", ID: "3"}, Place("host:12", 4, 3)),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, Place(detector="gketpu")),
        ({"TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "0"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, Place(detector="gketpu")),
        ({"D2G_CLUSTER": "gcetpu"}, Place(detector="gcetpu")),
    ],
)
def test_the_environment_says_who_takes_part(environment, place):
    assert find_place(environment) == place


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({COUNT: "2"}, "JAX_NUM_PROCESSES set, JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID not"),
        ({ADDRESS: "host:12", COUNT: "2"}, "JAX_PROCESS_ID not"),
        ({ADDRESS: "host", COUNT: "2", ID: "0"}, "HOST:PORT"),
        ({ADDRESS: "host:12", COUNT: "two", ID: "0"}, "JAX_NUM_PROCESSES=two"),
        ({ADDRESS: "host:12", COUNT: "2", ID: "2"}, "from 0 to 1"),
        ({"D2G_CLUSTER": "lsf"}, "D2G_CLUSTER=lsf is unknown; choose one of slurm"),
    ],
)
def test_half_set_variables_are_named(environment, message):
    with pytest.raises(UserError, match=message):
        find_place(environment)


def test_a_watch_that_is_stopped_while_the_store_goes_ends_quietly(monkeypatch):
    stopped = threading.Event()
    monkeypatch.setattr(distributed, "_stopped", stopped)
    monkeypatch.setattr(distributed, "_POLL_SECONDS", 0)

    def gone(text):
        stopped.set()
        raise jax.errors.JaxRuntimeError("the store is gone")

    monkeypatch.setattr(distributed, "_show", gone)
    distributed._watch()
