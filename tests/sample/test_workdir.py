"""A training workdir as a model: its teacher where it was, somewhere else, or another's."""

import dataclasses
import json
import os
import shutil
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from d2g_jax.__main__ import main
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.pipeline.hub import folder_hash
from d2g_jax.runtime import mesh as meshes
from d2g_jax.sample.sampler import Parts, Sampler
from d2g_jax.train.checkpoint import Checkpoints
from d2g_jax.train.state import UPDATES, TrainState


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder to which the teacher was moved."""
    made = tiny.make(Path(os.environ["D2G_JAX_TINY"])) / "pipeline"
    return shutil.copytree(made, tmp_path_factory.mktemp("moved") / "teacher")


@pytest.fixture(scope="module")
def unet(teacher):
    return jax.tree.map(lambda leaf: np.asarray(leaf) * np.float32(1.5), Pipeline.load(teacher).params["unet"])


@pytest.fixture(scope="module")
def workdir(teacher, unet, tmp_path_factory):
    """A checkpoint of a student whose teacher lay in a folder that is no more."""
    folder = tmp_path_factory.mktemp("run")
    metadata = {"timestep": 999, "pipeline": "/no/such/folder", "teacher_hash": folder_hash(teacher)}
    fields = {field.name: {} for field in dataclasses.fields(TrainState)}
    counts = {"step": np.int32(1), "images": np.int32(8), "left_out": {update: np.int32(0) for update in UPDATES}}
    with Checkpoints(folder / "checkpoints", keep=1) as checkpoints:
        state = TrainState(**{**fields, **counts, "ema": unet})
        checkpoints.save(meshes.place(state, meshes.make_mesh()), metadata)
    return folder


def refused(capsys, *command):
    assert main([*map(str, command)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_moved_teacher_is_named(workdir, teacher, unet):
    sampler = Sampler.load(workdir, meshes.make_mesh(), parts=Parts(pipeline=teacher))
    assert sampler.timestep == 999
    assert sampler.pipeline.folder == teacher
    jax.tree.map(np.testing.assert_array_equal, sampler.pipeline.params["unet"], unet)


@pytest.mark.parametrize("job", ["sample", "export", "play", "evaluate"])
def test_without_it_every_job_asks_for_it(job, workdir, tmp_path, capsys):
    flags = {
        "sample": ["--prompt=7", f"--out={tmp_path / 'out'}"],
        "export": ["--to=flax", f"--out={tmp_path / 'out'}"],
        "play": ["--port=0"],
        "evaluate": ["--protocol=digits", "--samples=2", "--metrics=accuracy", f"--out={tmp_path / 'a.json'}"],
    }
    error = refused(capsys, job, f"--model={workdir}", *flags[job])
    assert f"{workdir}: its teacher is not in /no/such/folder any more; say where, pipeline=FOLDER" in error


def test_another_teacher_is_refused(workdir, teacher, tmp_path, capsys):
    other = shutil.copytree(teacher, tmp_path / "other")
    file = other / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "beta_end": 0.013}))
    out = f"--out={tmp_path / 'out'}"
    error = refused(capsys, "sample", f"--model={workdir}", f"--pipeline={other}", "--prompt=7", out)
    assert f"{other}: another pipeline than /no/such/folder, the teacher of {workdir}" in error
    error = refused(capsys, "sample", f"--model={teacher}", f"--pipeline={teacher}", "--prompt=7", out)
    assert "no training workdir, and only that looks for its teacher; leave out pipeline" in error


def test_a_cpu_writes_the_float16_program_of_gpus(workdir, teacher, tmp_path):
    out = tmp_path / "student.zip"
    flags = [f"--pipeline={teacher}", "--to=stablehlo", "--dtype=float16", f"--out={out}"]
    assert main(["export", f"--model={workdir}", *flags]) == 0
    with zipfile.ZipFile(out) as archive:
        meta = json.loads(archive.read("meta.json"))
    assert (meta["dtype"], meta["platforms"]) == ("float16", ["cuda", "tpu"])
