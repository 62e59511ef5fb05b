"""Signals in the middle of a job: exit code 130 or 143, one line, and the same command goes on from whole files."""

import json
import signal
import subprocess
import sys
import time

import pytest
import saved
from tiny import CONFIG, get_config

from d2g_jax import pairs, records
from d2g_jax.train.checkpoint import Checkpoints

# A shell starts background jobs with SIGINT ignored, and so would the test's child be.
LISTENING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from d2g_jax.__main__ import main
sys.exit(main())
"""
SMALL_PAIRS = [CONFIG, "--config.pairs.records_per_shard=8", "--config.pairs.steps=3", "--config.pairs.batch_size=8"]
SMALL_TRAIN = [CONFIG, "--config.train.batch_size=8", "--config.train.log_every=8", "--config.train.checkpoint_every=8"]


@pytest.fixture(scope="module", autouse=True)
def _networks():
    """Those of CONFIG, made before a job reads it: one that computes them itself cannot choose its devices any more."""
    get_config()


def interrupted(ready, *arguments, by=signal.SIGINT):
    """(exit code, stderr) of a job that gets a signal as soon as `ready()` is true."""
    command = [sys.executable, "-c", LISTENING, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 300
        while not ready():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(by)
        _, err = process.communicate(timeout=120)
    return process.returncode, err


def assert_polite(code, err, word="interrupted", expected=130):
    assert code == expected, err
    assert "Traceback" not in err
    assert err.rstrip().splitlines()[-1] == f"d2g: {word}; the same command goes on from here"


def test_pairs_go_on_after_an_interrupt(tmp_path):
    folder = tmp_path / pairs.FOLDER
    command = ["pairs", f"--workdir={tmp_path}", *SMALL_PAIRS, "--config.pairs.count=40000"]
    whole = lambda: {file: file.stat().st_mtime_ns for file in folder.glob("pairs-*.json")}  # noqa: E731
    assert_polite(*interrupted(lambda: len(whole()) >= 2, *command))
    assert not list(folder.glob(".*.tmp"))  # the shard under way is gone
    manifest = records.Manifest.read(folder)
    done = sorted(set(range(manifest.num_shards)) - set(records.missing_shards(folder, manifest)))
    assert len(done) == len(whole()) >= 2
    assert [problem for shard in done for problem in records.verify_shard(folder, manifest, shard)] == []

    # The same command again, terminated this time: the shards that are there are left alone, its claims given back.
    before = whole()
    outcome = interrupted(lambda: len(whole()) > len(before), *command, by=signal.SIGTERM)
    assert_polite(*outcome, word="terminated", expected=143)
    assert before.items() <= whole().items()
    assert not list(folder.glob(".*.tmp")) + list((folder / "claims").iterdir())


COMMAND = [sys.executable, "-m", "d2g_jax"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixteen pairs."""
    workdir = tmp_path_factory.mktemp("pairs")
    made = [*COMMAND, "pairs", f"--workdir={workdir}", *SMALL_PAIRS, "--config.pairs.count=16"]
    subprocess.run(made, check=True, capture_output=True)
    return workdir / pairs.FOLDER


@pytest.mark.slow
def test_training_goes_on_after_an_interrupt(folder, tmp_path):
    train = ["train", f"--workdir={tmp_path}", f"--pairs={folder}", *SMALL_TRAIN, "--config.adversarial.weight=0"]
    train.append("--config.loss.name=mse")  # compiles in half the time
    rows = lambda: (tmp_path / "metrics.jsonl").read_text().splitlines()  # noqa: E731
    written = lambda: [file for file in (tmp_path / "checkpoints").glob("*") if file.name.isdigit()]  # noqa: E731
    endless = [*train, "--config.train.images=80000"]

    def in_use():
        """A second run is refused while the first trains."""
        if len(written()) < 2:
            return False
        second = subprocess.run([*COMMAND, *endless], capture_output=True, text=True, check=False)
        assert second.returncode == 2
        assert f"d2g: {tmp_path}: in use by process" in second.stderr.splitlines()[-1]
        return True

    assert_polite(*interrupted(in_use, *endless))
    first = newest(tmp_path)
    assert len(rows()) == first // 8  # the step under way was finished, logged and saved

    def saving():
        """In the middle of a save: every later step is saved at once."""
        under_way = list((tmp_path / "checkpoints").glob("*.orbax-checkpoint-tmp"))
        return under_way and max(int(file.name) for file in written()) >= first + 16

    outcome = interrupted(saving, *endless, by=signal.SIGTERM)
    assert_polite(*outcome, word="terminated", expected=143)
    second = newest(tmp_path)
    again = subprocess.run(
        [*COMMAND, *train, f"--config.train.images={second + 8}"], check=True, capture_output=True, text=True
    )
    assert f"{second + 8}/{second + 8}" in again.stderr
    assert [json.loads(row)["images"] for row in rows()] == list(range(8, second + 9, 8))  # each step once


def test_sigterm_while_compiling_leaves_at_once(folder, tmp_path, monkeypatch):
    """Nothing is there to lose, and the time that a pre-emption leaves may be shorter than a compilation."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "empty"))
    command = ["train", f"--workdir={tmp_path}", f"--pairs={folder}", *SMALL_TRAIN, "--config.train.images=80000"]
    # The run's config is written just before it compiles, which takes a minute without a cache.
    began = lambda: (tmp_path / "config.json").exists() and (time.sleep(2.0) or True)  # noqa: E731
    outcome = interrupted(began, *command, by=signal.SIGTERM)
    assert_polite(*outcome, word="terminated", expected=143)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert not [path for path in (tmp_path / "checkpoints").glob("*") if path.name.isdigit()]


def newest(workdir):
    """Images at the newest checkpoint, all of whose arrays can be read."""
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        images = checkpoints.latest()
    assert int(saved.trees(workdir / "checkpoints")["state"]["images"]) == images
    return images


STRIKES = """
import atexit, gc, os, signal, sys, time, weakref
signal.signal(signal.SIGINT, signal.default_int_handler)
from d2g_jax.__main__ import main
from d2g_jax.commands import report
from d2g_jax.runtime.interrupt import started

class Struck:
    pass

def strike(*_):
    signal.raise_signal(signal.SIGINT)

def job(arguments):
    started()
    thing = Struck()
    {where}
    time.sleep({seconds})
    return 0

report.run = job
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("where", "seconds", "line"),
    [
        ("Struck.__del__ = strike; del thing", 60, "interrupted; nothing was kept, the same command begins anew"),
        ("gc.callbacks.append(lambda *_: gc.callbacks.clear() or strike()); gc.collect()", 60, "interrupted; nothing"),
        ("seen = weakref.ref(thing, strike); del thing", 60, "interrupted; nothing was kept"),
        ("atexit.register(os.abort); strike()", 60, "interrupted; nothing was kept"),  # what jax does now and then
        ("atexit.register(strike)", 0, "interrupted after the job's end"),
    ],
)
def test_ctrl_c_where_python_lets_no_exception_out(where, seconds, line):
    """As in what jax does while garbage is collected, and in what is left to do when a job has ended."""
    script = STRIKES.format(where=where, seconds=seconds)
    ended = subprocess.run([sys.executable, "-c", script, "report"], capture_output=True, text=True, timeout=50)
    assert ended.returncode == 130, ended.stderr
    assert ended.stderr.startswith(f"d2g: {line}")
    assert ended.stderr.count("\n") == 1
