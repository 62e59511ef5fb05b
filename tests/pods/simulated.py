"""Processes of simulated devices, alone or together, and the comparison of what they computed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

WORKER = Path(__file__).with_name("worker.py")
SECONDS = 1500  # the machine may be busy with other things


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(command: list[str], process: int = 0, count: int = 1, port: int = 0, **environment: str) -> subprocess.Popen:
    """One of `count` processes that find each other at `port`."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_NUM_CPU", "SLURM_"))}
    if count > 1:
        own |= {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(process),
        }
    own |= {"PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.Popen(
        [sys.executable, *command], env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ends(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each; none is left behind."""
    try:
        output = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, output, strict=True)]


def work(count: int = 1, **spec) -> dict[str, np.ndarray]:
    """Runs `count` workers on `spec` together and returns what they wrote, by path."""
    port, command = free_port(), [str(WORKER), json.dumps(spec)]
    for code, _, errors in ends([start(command, i, count, port) for i in range(count)]):
        assert code == 0, errors[-3000:]
    if "out" not in spec:
        return {}
    with np.load(spec["out"]) as file:
        return dict(file)
