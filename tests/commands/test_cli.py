"""The `d2g` command as a stranger meets it: exit codes and one line for whatever is wrong."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import d2g_jax
from d2g_jax.__main__ import main
from d2g_jax.commands import common
from d2g_jax.commands.common import JOBS
from d2g_jax.config.configuration import read_config
from d2g_jax.runtime.errors import UserError


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def one_line(capsys, *arguments):
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert err.startswith("d2g: ")
    assert err.count("\n") == 1
    return err


def test_help_names_every_job(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(job in out for job in JOBS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"d2g_jax {d2g_jax.__version__}\n"
    assert f"\nversion = {d2g_jax.__version__}\n" in Path("setup.cfg").read_text()


@pytest.mark.parametrize("job", JOBS)
def test_every_job_has_help(job, capsys):
    with pytest.raises(SystemExit) as stop:
        main([job, "--help"])
    assert stop.value.code == 0
    assert f"d2g {job}" in capsys.readouterr().out


def test_unknown_job(capsys):
    assert "unknown job 'distil'" in one_line(capsys, "distil")


def test_unknown_flag(capsys, tmp_path):
    assert "--wrokdir" in one_line(capsys, "demo", f"--wrokdir={tmp_path}")


@pytest.mark.parametrize("value", ["--config.train.imagse=5", "--config.no.such=1"])
def test_unknown_config_key(value, capsys, tmp_path):
    assert value.split("=")[0].rpartition(".")[2] in one_line(capsys, "train", f"--workdir={tmp_path}", value)


def test_config_value_of_the_wrong_type(capsys, tmp_path):
    assert "train.images" in one_line(capsys, "train", f"--workdir={tmp_path}", "--config.train.images=many")


def test_unknown_optimization_level(capsys, tmp_path):
    assert "O9" in one_line(capsys, "pairs", f"--workdir={tmp_path}", "--config.optimization_level=O9")


def test_missing_config_file(capsys, tmp_path):
    assert "nowhere.py" in one_line(capsys, "train", f"--workdir={tmp_path}", "--config=nowhere.py")


def test_config_overrides_and_files():
    assert read_config().train.batch_size == read_config(Path("configs/digits.py")).train.batch_size
    overrides = ["--config.train.batch_size=16", "--config.loss.name=mse", "--config.generator.timestep=399"]
    changed = read_config(overrides=overrides)
    assert (changed.train.batch_size, changed.loss.name, changed.generator.timestep) == (16, "mse", 399)
    with pytest.raises(UserError):
        read_config(overrides=["--config.train.batch_size=1.5"])


def test_config_value_without_an_equals_sign(capsys, tmp_path):
    error = one_line(capsys, "train", f"--workdir={tmp_path}", "--config.train.images", "64")
    assert "--config.train.images=VALUE" in error


@pytest.mark.parametrize(
    ("job", "config", "section"),
    [
        ("train --workdir={0}", "lpips", "pairs"),
        ("pairs --workdir={0}", "evaluate/digits", "mesh"),
        ("pairs verify {0}", "lpips", "pairs"),
        ("plan --topology=gpu:1xL4", "lpips", "pairs"),
        ("overfit --workdir={0}", "lpips", "overfit"),
        ("ablate losses --workdir={0}", "lpips", "pairs"),
        ("bench train", "lpips", "pairs"),
        ("demo --workdir={0}", "sd15", "evaluation"),
        ("teacher --workdir={0}", "sd15", "teacher"),
        ("lpips --workdir={0}", "digits", "trunk"),
    ],
)
def test_a_config_of_another_job(job, config, section, capsys, tmp_path):
    error = one_line(capsys, *job.format(tmp_path).split(), f"--config=configs/{config}.py")
    assert f"configs/{config}.py: has no section {section}, which `d2g " in error


def test_lpips_without_a_config(capsys, tmp_path):
    assert "--config is missing; give a file such as configs/lpips.py" in one_line(
        capsys, "lpips", f"--workdir={tmp_path}"
    )


@pytest.mark.parametrize(
    "job",
    [
        "bench loss --seed=-1",
        "bench sample --seed=-1",
        "bench train --seed=-1",
        "bench pairs --seed=-1",
        "pairs verify nowhere --resolve=2 --resolve-seed=-1",
    ],
)
def test_a_seed_below_zero(job, capsys):
    assert "seed=-1; give a whole number from 0" in one_line(capsys, *job.split())


def test_unwritable_workdir(capsys, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    assert str(blocker) in one_line(capsys, "pairs", f"--workdir={blocker}")


def test_missing_pipeline(capsys, tmp_path):
    assert "nowhere" in one_line(capsys, "pairs", f"--workdir={tmp_path}", f"--config.pipeline={tmp_path}/nowhere")


def test_runtime_imports_neither_torch_nor_tensorflow():
    """Every module of the package, and the teacher loaded, in a fresh process."""
    code = """
import pkgutil, sys
import d2g_jax
for module in pkgutil.walk_packages(d2g_jax.__path__, "d2g_jax."):
    if not module.name.endswith("__main__"):
        __import__(module.name)
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.digits.config import get_config
Pipeline.load(get_config().pipeline)
loaded = {"torch", "tensorflow", "diffusers"} & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Two files of scaled latents as `d2g sample` writes them."""
    folder, rng = tmp_path_factory.mktemp("latents"), np.random.default_rng(0)
    files = [folder / "a.npy", folder / "b.npy"]
    for file in files:
        np.save(file, rng.normal(size=(3, 4, 8, 8)).astype(np.float32))
    return files


METRIC = Path("d2g_jax/digits/weights/metric")


def test_metric_prints_json(capsys, latents):
    code, out, _ = run(capsys, "metric", f"--weights={METRIC}", f"--a={latents[0]}", f"--b={latents[1]}", "--draws=2")
    measured = json.loads(out)
    assert code == 0
    assert measured["metric"] == "e_latent_lpips"
    assert len(measured["distances"]) == 3
    assert min(measured["distances"]) > 0


@pytest.mark.parametrize(("given", "expected"), [("0", 0.0), (None, 0.5)])
def test_the_environment_decides_how_small_a_program_is_kept(given, expected, monkeypatch):
    """Otherwise those that take half a second to compile."""
    variable, option = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "jax_persistent_cache_min_compile_time_secs"
    monkeypatch.delenv(variable, raising=False)
    if given is not None:
        monkeypatch.setenv(variable, given)
    before = getattr(jax.config, option)
    try:
        jax.config.update(option, 0.0)  # what jax made of the variable when it started
        common.start()
        assert getattr(jax.config, option) == expected
    finally:
        jax.config.update(option, before)


def test_warnings_are_one_line(latents):
    """In a process of its own, where they are printed."""
    code = f"""
import sys, warnings
from d2g_jax.__main__ import main
code = main(["metric", "--weights={METRIC}", "--a={latents[0]}", "--b={latents[1]}"])
warnings.warn("some donated buffers were not usable")  # of a library: not of this package's files
warnings.warn_explicit("looks raw", UserWarning, main.__code__.co_filename, 1)
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.splitlines()[-1] == "d2g: warning: looks raw"
    assert "donated" not in done.stderr


def test_convert_of_a_missing_file(capsys, tmp_path):
    pytest.importorskip("torch")
    error = one_line(capsys, "metric", "convert", tmp_path / "none.pth", "--space=sd15", f"--out={tmp_path / 'out'}")
    assert "none.pth" in error


def test_lpips_needs_a_config(capsys, tmp_path):
    assert "configs/lpips.py" in one_line(capsys, "lpips", f"--workdir={tmp_path}")


def test_lpips_names_what_is_missing(capsys, tmp_path):
    pipeline = Path("d2g_jax/digits/weights/pipeline").resolve()
    overrides = [f"--config.pipeline={pipeline}", "--config.images.train=nowhere"]
    assert "nowhere" in one_line(capsys, "lpips", "--config=configs/lpips.py", f"--workdir={tmp_path}", *overrides)


def test_unknown_bench(capsys):
    assert "unknown bench 'speed'" in one_line(capsys, "bench", "speed")


def test_bench_flags_are_checked_before_anything_is_compiled(capsys, tmp_path):
    assert "--size=10" in one_line(capsys, "bench", "loss", "--size=10")
    assert "--out" in one_line(capsys, "bench", "loss", f"--out={tmp_path}")
    assert "--sise" in one_line(capsys, "bench", "loss", "--sise=512")
    assert "--parts=vea" in one_line(capsys, "bench", "sample", "--parts=vea")
    assert "--losses=mse,mse" in one_line(capsys, "bench", "train", "--losses=mse,mse")
    assert "did you mean train.images" in one_line(capsys, "bench", "train", "--config.train.imags=8")
    assert "train.groups=2" in one_line(capsys, "bench", "train", "--batches=3")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a.json"), "a.json: cannot be written (No space left on"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "cannot be written (Disk quota exceeded); make room"),
        (OSError(errno.EROFS, "Read-only file system", "a"), "a: cannot be written (Read-only file system)"),
        (MemoryError(), "out of memory (of the host); take smaller batches"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n..."),
            "allocating 9 bytes.);",
        ),
        (RuntimeError("Unable to initialize backend 'cuda': no plugin"), "'cuda': no plugin; JAX_PLATFORMS names"),
    ],
)
def test_what_the_machine_lacks_is_one_line_in_every_job(error, said, monkeypatch, capsys):
    def lacking(_):
        raise error

    monkeypatch.setattr("d2g_jax.__main__._run", lacking)
    assert said in one_line(capsys, "sample")


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), RuntimeError("INTERNAL"), KeyError("a")])
def test_a_fault_of_ours_is_a_traceback(error, monkeypatch):
    def failing(_):
        raise error

    monkeypatch.setattr("d2g_jax.__main__._run", failing)
    with pytest.raises(type(error)):
        main(["sample"])


def test_nobody_reads_any_more():
    """As behind `| head`, where the shell's own tools end with 141 and without a word."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "d2g_jax", "--help"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(("job", "hint"), [("samle", "sample"), ("evalute", "evaluate"), ("trian", "train")])
def test_a_job_that_is_nearly_one(job, hint, capsys):
    assert f"unknown job {job!r}; did you mean {hint}?" in one_line(capsys, job)


@pytest.mark.parametrize(
    "command",
    [
        ["sample", "--model=m", "--out=o", "--prompt=caf\udce9"],
        ["sample", "--model=m", "--out=o", "--prompt=a", "--negative=a \ud83d"],
        ["sample", "--prompt=a", "--out=o", "--model=caf\udce9"],
        ["evaluate", "--protocol=digits", "--out=o", "--name=caf\udce9"],
        ["pairs", "--workdir=w", "--config.pairs.negative_prompt=caf\udce9"],
        ["report", "--workdir", "caf\udce9"],
        ["caf\udce9"],
    ],
)
def test_bytes_of_a_terminal_that_are_no_text_are_named(command, capsys):
    assert f"argument {command[-1].partition('=')[0]!a} holds half a character" in one_line(capsys, *command)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["export"], "interrupted; nothing was kept, the same command begins anew"),
        (["metric"], "interrupted; nothing was kept"),
        (["pairs", "verify"], "interrupted; nothing was kept"),
        (["train"], "interrupted; the same command goes on from here"),
        (["sample"], "interrupted; the same command goes on from here"),
    ],
)
def test_an_interrupted_job_says_what_is_kept(command, said, monkeypatch, capsys):
    def stopped(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("d2g_jax.__main__._run", stopped)
    assert main(command) == 130
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "spoken",
    [
        "warnings.warn_explicit('theirs', UserWarning, '/lib/orbax/checkpoint.py', 1)",
        "warnings.warn_explicit('theirs', FutureWarning, '/lib/transformers/tokenizer.py', 1)",
        "warnings.warn_explicit('theirs', DeprecationWarning, '/lib/flax/core.py', 1)",
        "logging.getLogger('absl').error('theirs')",
        "logging.getLogger('asyncio').error('theirs')",
    ],
)
def test_what_libraries_say_is_not_our_output(spoken):
    ours = "warnings.warn_explicit('ours', UserWarning, main.__code__.co_filename, 1)"
    code = (
        "import logging, warnings; from d2g_jax.__main__ import main; from d2g_jax.commands import report\n"
        f"report.run = lambda _: [warnings.simplefilter('always'), {spoken}, {ours}, 0][-1]\nmain(['report'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "d2g: warning: ours\n"


def test_a_latin_1_terminal_shows_what_it_can():
    code = "import sys; from d2g_jax.__main__ import main; main(['--version']); print('a – b “c”')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "latin-1"}
    )
    assert done.returncode == 0, done.stderr
    assert b"a ? b ?c?" in done.stdout


def test_ctrl_c_before_the_work_ends_the_process():
    code = (
        "import os, signal; from d2g_jax.runtime.interrupt import starting\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # whoever runs the tests may ignore it (nohup)
        "with starting():\n    os.kill(os.getpid(), signal.SIGINT)\n    print('swallowed')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "d2g: interrupted before anything was begun\n"  # true of jobs that keep nothing too
