"""Worker processes killed with SIGKILL at random moments, one of them late: the folder comes out byte for byte.

Workers are forked from a server that has imported everything, and find their programs in the compilation cache.
"""

import contextlib
import json
import multiprocessing
import os
import random
import socket
import time
from pathlib import Path

import jax
import pytest
from tiny import get_config

from d2g_jax import pairs, records

SHARDS, SIZE = 30, 8
PATIENCE = 400.0  # seconds for anything to happen, on a machine that is busy with other work


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["d2g_jax.pairs", "d2g_jax.digits.config", "transformers.models.clip.tokenization_clip", "tensorflow_datasets"]
    )
    return context


def config(**changes):
    c = get_config()
    settings = {"count": SHARDS * SIZE, "records_per_shard": SIZE, "steps": 10, "batch_size": SIZE}
    c.pairs.update(settings | {"lease_seconds": 2.0} | changes)
    return c


def work(workdir, cluster=None, **changes):
    """What a worker process runs; `cluster` is (address, number of processes, its own number) of one JAX job."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    with (workdir / f"{os.getpid()}.log").open("w") as log, contextlib.redirect_stderr(log):
        if cluster is not None:
            jax.distributed.initialize(*cluster)
        pairs.make_pairs(config(**changes), workdir)
        if cluster is not None:
            jax.distributed.shutdown()


def start(processes, workdir, *arguments, **changes):
    process = processes.Process(target=work, args=(workdir, *arguments), kwargs=changes)
    process.start()
    return process


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.endswith(".tmp")}


@pytest.fixture(scope="module")
def reference(processes, tmp_path_factory):
    """The files of a run by one worker that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("reference")
    worker = start(processes, workdir)
    worker.join(PATIENCE)
    assert worker.exitcode == 0, logs(workdir)
    return files(workdir / pairs.FOLDER)


def logs(workdir):
    return "\n".join(file.read_text() for file in workdir.glob("*.log"))


def at_work(folder, workers):
    """A living worker that holds a claim; None when all work is done before one is seen."""
    deadline = time.monotonic() + PATIENCE
    while any(worker.is_alive() for worker in workers):
        assert time.monotonic() < deadline
        for file in (folder / "claims").glob("*.json") if (folder / "claims").is_dir() else ():
            with contextlib.suppress(OSError, ValueError):  # just given back, or just being written
                pid = json.loads(file.read_text())["pid"]
                if found := [worker for worker in workers if worker.pid == pid and worker.is_alive()]:
                    return found[0]
        time.sleep(0.01)
    return None


def killed(processes, workdir, count, kills, rng):
    """Runs `count` workers, the last of three joining late, and kills one after another; a killed one is replaced."""
    folder, workers = workdir / pairs.FOLDER, []
    workers += [start(processes, workdir) for _ in range(2 if count == 3 else count)]
    for number in range(kills):
        victim = at_work(folder, workers)
        assert victim is not None, f"all done after {number} kills: {logs(workdir)}"
        time.sleep(rng.uniform(0.0, 0.3))
        victim.kill()
        victim.join()
        assert victim.exitcode == -9
        if number == 0 or number + 1 < kills or count == 1:
            workers.append(start(processes, workdir))
    for worker in workers:
        worker.join(PATIENCE)
        assert worker.exitcode in (0, -9), logs(workdir)
    assert sum(worker.exitcode == -9 for worker in workers) == kills
    return folder


@pytest.mark.parametrize(
    ("count", "kills"),
    [(1, 1), *(pytest.param(*many, marks=pytest.mark.slow) for many in ((2, 1), (3, 2), (1, 6), (2, 7), (3, 7)))],
)
def test_killed_workers_leave_every_record_once(processes, reference, tmp_path, count, kills):
    folder = killed(processes, tmp_path, count, kills, random.Random(100 * count + kills))
    assert files(folder) == reference
    assert not list(folder.glob(".pairs-*"))
    assert records.verify(folder) == []
    source = records.PairSource(folder, fields=("id",))
    assert [int(source[i]["id"]) for i in range(len(source))] == list(range(SHARDS * SIZE))


def test_processes_of_one_job_divide_the_shards(processes, reference, tmp_path):
    """No claims: process p of 2 makes the shards p, p + 2, ... on its own devices, and both wait for all of them."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        address = f"localhost:{server.getsockname()[1]}"
    workers = [start(processes, tmp_path, (address, 2, i), lease_seconds=0.0) for i in range(2)]
    for worker in workers:
        worker.join(PATIENCE)
    assert [worker.exitcode for worker in workers] == [0, 0], logs(tmp_path)
    assert files(tmp_path / pairs.FOLDER) == reference
    text = logs(Path(tmp_path))
    assert "pairs, process 1 of 2" in text
    assert "pairs, process 2 of 2" in text
