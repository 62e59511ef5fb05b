"""Real processes that find each other over TCP: they agree, refuse together, and end together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from simulated import SECONDS, ends, free_port, start

LAUNCH = Path(__file__).parents[2] / "launch" / "local.sh"
TRAIN = ["-m", "d2g_jax", "train", "--config.mesh.cpu_devices=4", "--workdir=WORKDIR", "--pairs=none"]

# `d2g` with processes that look at each other more often; the slow tests here run as users do.
QUICK = """
import sys
from d2g_jax.__main__ import main
from d2g_jax.runtime import distributed
distributed._POLL_SECONDS = 0.5
sys.exit(main(sys.argv[1:]))
"""

LOOP = """
import sys, time, jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from d2g_jax.runtime import distributed, mesh
from d2g_jax.runtime.errors import UserError
mesh.use_cpu_devices(1)
distributed.start({})
m = mesh.make_mesh()
total = jax.jit(jnp.sum, out_shardings=NamedSharding(m, PartitionSpec()))
x = mesh.place_batch(jnp.ones(1), m)
for step in range(10_000):
    try:
        jax.block_until_ready(total(x))
    except Exception:
        distributed.crash()
    if step == 0:
        print("ready", flush=True)
    if sys.argv[1] == "refuses" and jax.process_index() == 1:
        sys.exit(distributed.finish(2, "my disk is full"))
    time.sleep(0.1)
"""


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--config.train.images=100", "--config.train.images=200"), "has train.images=200, process 0 has 100"),
        pytest.param(
            ("--config.mesh.fsdp=3",) * 2, "mesh.fsdp=3 does not divide the 8 devices", marks=pytest.mark.slow
        ),
        pytest.param(
            ("--config.train.groups=4",) * 2,
            "train.groups=4 is not a multiple of the 8 devices",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_bad_input_is_one_line_of_process_0_and_exit_2_everywhere(flags, line, tmp_path):
    port, command = free_port(), [word.replace("WORKDIR", str(tmp_path)) for word in TRAIN]
    (code, _, errors), (other_code, _, other_errors) = ends(
        [start([*command, flag], i, 2, port) for i, flag in enumerate(flags)]
    )
    assert (code, other_code) == (2, 2), errors + other_errors
    said = [text for text in errors.splitlines() if text.startswith("d2g:")]
    assert len(said) == 1
    assert line in said[0]
    assert "Traceback" not in errors + other_errors
    assert "d2g:" not in other_errors


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_takes_the_job_down_within_a_minute_and_says_which(victim):
    port = free_port()
    processes = [start(["-c", LOOP, "goes on"], i, 2, port) for i in range(2)]
    while (line := processes[victim].stdout.readline()) != "ready\n":  # Gloo prints lines of its own
        assert line
    processes[victim].send_signal(signal.SIGKILL)
    begun = time.monotonic()
    code, _, errors = ends([processes[1 - victim], processes[victim]])[0]
    seconds = time.monotonic() - begun
    print(f"{seconds:.1f} s, exit code {code}: {errors.splitlines()[-1]}")
    assert seconds < 60
    if victim == 0:  # the coordinator's end makes JAX abort, in words of its own
        assert code in (-signal.SIGABRT, 75)
        assert "leader task was preempted/died" in errors or "d2g: process 0 of 2 " in errors
    else:
        assert code == 75
        assert "d2g: process 1 of 2 gave no sign of life for 30 s" in errors


@pytest.mark.slow
def test_one_that_refuses_alone_is_named_and_the_others_follow():
    port = free_port()
    (code, _, errors), (other_code, _, other_errors) = ends(
        [start(["-c", LOOP, "refuses"], i, 2, port) for i in range(2)]
    )
    assert (code, other_code) == (2, 2)
    assert "d2g: process 1: my disk is full\n" in other_errors
    assert "d2g: process 1 of 2 has ended: my disk is full; " in errors


def test_one_that_fails_before_it_has_a_config_takes_the_others_along(tmp_path):
    port, command = free_port(), ["-c", QUICK, *(word.replace("WORKDIR", str(tmp_path)) for word in TRAIN[2:])]
    begun = time.monotonic()
    (code, _, errors), (other_code, _, other_errors) = ends(
        [start([*command, *flags], i, 2, port) for i, flags in enumerate([(), ("--config=missing.py",)])]
    )
    assert (code, other_code) == (2, 2), errors + other_errors
    assert "d2g: process 1: --config=missing.py: no such file" in other_errors
    assert "d2g: process 1 of 2 has ended: --config=missing.py: no such file" in errors
    assert time.monotonic() - begun < 60


def test_one_that_waits_in_vain_says_so_and_ends():
    script = "from d2g_jax.runtime import distributed as d; d._SILENT_SECONDS, d._CONNECT_SECONDS = 1, 3; d.join()"
    ports = [free_port() for _ in range(2)]
    both = ends([start(["-c", script], process, 2, port) for process, port in enumerate(ports)])
    for process, (port, (code, _, errors)) in enumerate(zip(ports, both, strict=True)):
        assert code == 75
        assert errors.splitlines()[-1].startswith(
            f"d2g: localhost:{port}: process {process} of 2 waited 3 s for the others"
        )


def test_half_set_variables_are_refused_before_any_waiting(tmp_path):
    command = [word.replace("WORKDIR", str(tmp_path)) for word in TRAIN]
    ((code, _, errors),) = ends([start(command, JAX_NUM_PROCESSES="2")])
    assert code == 2
    assert errors == (
        "d2g: JAX_NUM_PROCESSES set, JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID not: set all three, or none of them\n"
    )


def test_the_launcher_says_how_it_is_used():
    ended = subprocess.run(["bash", LAUNCH, "two"], capture_output=True, text=True, timeout=SECONDS)
    assert ended.returncode == 2
    assert "usage: launch/local.sh PROCESSES" in ended.stderr


@pytest.mark.slow
def test_the_launcher_trains_in_two_processes_of_four_devices(tmp_path):
    """launch/local.sh for real: pairs divided, parameters sharded, one progress, pictures, checkpoints; resumed."""
    small = ["--config.pairs.count=32", "--config.pairs.records_per_shard=8", "--config.pairs.steps=2"]
    small += ["--config.pairs.batch_size=8", "--config.mesh.cpu_devices=4", f"--workdir={tmp_path}"]
    train = ["train", "--config.mesh.fsdp=4", "--config.train.groups=8", "--config.train.batch_size=16", *small]
    train += ["--config.adversarial.start_images=16", "--config.adversarial.warmup_images=0"]

    def launch(*command):
        with subprocess.Popen(
            ["bash", LAUNCH, "2", sys.executable, "-m", "d2g_jax", *command],
            env={**os.environ, "PORT": str(free_port()), "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as launcher:
            try:
                out, errors = launcher.communicate(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(launcher.pid, signal.SIGKILL)  # the shell's own processes too
                raise
        assert launcher.returncode == 0, errors[-3000:]
        return out, errors

    launch("pairs", *small)
    for images in (32, 64):
        out, errors = launch(*train, f"--config.train.images={images}")
        assert errors.count(f"train digits: {images}/{images} img") == 1
        printed = out.splitlines()  # beside lines of Gloo's own, which two processes may write into each other
        assert printed.count(str(tmp_path / "report.html")) == 1
        assert (tmp_path / "samples" / f"images_{images:08d}.png").exists()
        assert json.loads((tmp_path / "samples" / "gallery.json").read_text())["images"] == images
        assert (tmp_path / "checkpoints" / str(images)).is_dir()
