"""Checkpoints: which are kept, what is refused, other meshes, and a kill in the middle of a save."""

import dataclasses
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.errors import UserError
from d2g_jax.train.checkpoint import Checkpoints
from d2g_jax.train.state import UPDATES, TrainState


def state(images, width=256, seed=0):
    """Leaves large enough to be sharded by the rules of mesh.py, and some that are not."""
    rng = np.random.default_rng([seed, images])

    def weights():
        kernel = rng.standard_normal((64, width)).astype(np.float32)
        return {"a": {"kernel": kernel, "bias": np.ones(3, np.float32)}}

    return TrainState(
        step=np.int32(images // 8),
        images=np.int32(images),
        generator=weights(),
        ema=weights(),
        generator_optimizer=(weights(), np.int32(7)),
        discriminator={},
        discriminator_optimizer={},
        left_out={update: np.int32(0) for update in UPDATES},
    )


def assert_equal(restored, expected):
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)


def test_the_newest_and_the_best_are_kept(tmp_path):
    mesh = meshes.make_mesh()
    with Checkpoints(tmp_path, keep=2, keep_best="loss") as checkpoints:
        for images, metric in ((8, 3.0), (16, 1.0), (24, None), (32, 2.0), (40, 4.0)):
            checkpoints.save(meshes.place(state(images), mesh), {"images": images}, metric)
        checkpoints.wait()
        assert checkpoints.all() == [16, 32, 40]
        assert checkpoints.latest() == 40
    with Checkpoints(tmp_path, keep=2, keep_best="loss") as checkpoints:  # a resumed run knows the best
        for images, metric, kept in ((48, 2.0, [16, 40, 48]), (56, 0.5, [48, 56])):
            checkpoints.save(meshes.place(state(images), mesh), {}, metric)
            checkpoints.wait()
            assert checkpoints.all() == kept
        assert_equal(checkpoints.restore(meshes.place(state(0), mesh)), state(56))


def test_another_metric_s_values_are_not_compared(tmp_path):
    mesh = meshes.make_mesh()
    with Checkpoints(tmp_path, keep=1, keep_best="loss") as checkpoints:
        checkpoints.save(meshes.place(state(8), mesh), {}, 0.15)
    with Checkpoints(tmp_path, keep=1, keep_best="gradient") as checkpoints:
        for images, metric in ((16, 1.4), (24, 1.2), (32, 1.3)):
            checkpoints.save(meshes.place(state(images), mesh), {}, metric)
        checkpoints.wait()
        assert checkpoints.all() == [24, 32]


def test_without_a_metric_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for images in (8, 16):
            checkpoints.save(meshes.place(state(images), meshes.make_mesh()), {"images": images})
        checkpoints.wait()
        assert checkpoints.all() == [16]
        assert checkpoints.metadata() == {"images": 16}


def test_a_checkpoint_of_other_networks_names_the_leaves(tmp_path):
    mesh = meshes.make_mesh()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(meshes.place(state(8), mesh), {})
    with Checkpoints(tmp_path) as checkpoints:
        wider = meshes.place(state(0, width=512), mesh)
        with pytest.raises(
            UserError, match=r"8: not a checkpoint .*generator/a/kernel has float32\[64, 256\], not .*512"
        ):
            checkpoints.restore(wider)
        other = meshes.place({"a": state(0).ema["a"], "b": jnp.ones(2)}, mesh)
        with pytest.raises(UserError, match=r"ema: b has nothing, not float32\[2\]"):
            checkpoints.restore_ema(other)
        bare = dataclasses.replace(meshes.place(state(0), mesh), generator_optimizer={})
        with pytest.raises(UserError, match=r"generator_optimizer/0/a/bias has float32\[3\], not nothing; "):
            checkpoints.restore(bare)


def test_a_reader_changes_nothing(tmp_path):
    with pytest.raises(UserError, match="no checkpoint here"), Checkpoints(tmp_path / "none") as checkpoints:
        checkpoints.metadata()
    assert not (tmp_path / "none").exists()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(meshes.place(state(8), meshes.make_mesh()), {})
    under_way = tmp_path / "16.orbax-checkpoint-tmp"
    (under_way / "state").mkdir(parents=True)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 8
    assert under_way.exists()  # it may be another process' save


@pytest.mark.parametrize(
    ("saved", "reason"),
    [
        ({}, r"its metadata have pipeline = None"),
        ({"pipeline": "teacher", "timestep": "999"}, r"its metadata have timestep = '999'"),
        ({"pipeline": "teacher", "timestep": 999, "config": None}, r"its metadata have config = None"),
    ],
)
def test_metadata_of_another_kind_are_a_damaged_checkpoint(saved, reason, tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for images, metadata in ((8, {"pipeline": "teacher", "timestep": 999}), (16, saved)):
            checkpoints.save(meshes.place(state(images), meshes.make_mesh()), metadata)
        with pytest.raises(UserError, match=rf"16: a damaged checkpoint \({reason}\); remove .* to go on from 8$"):
            checkpoints.metadata("pipeline", "timestep")


# Saves 8 whole, then no file may grow beyond 20 KB, as on a disk that is full. TensorStore's threads may then fail in a
# loop that is closed, one for each array: one is made here.
FULL = """
import asyncio, resource, sys
sys.path.insert(0, sys.argv[2])
from test_checkpoint import meshes, state, Checkpoints
from d2g_jax.__main__ import main
from d2g_jax.runtime.errors import UserError
main(["--version"])  # as the command does, with the libraries' own words turned off
try:
    with Checkpoints(sys.argv[1], keep=2) as checkpoints:
        checkpoints.save(meshes.place(state(8), meshes.make_mesh()), {"images": 8})
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        checkpoints.save(meshes.place(state(16), meshes.make_mesh()), {"images": 16})
except UserError as error:
    class Late:
        def __del__(self):
            loop = asyncio.new_event_loop()
            loop.close()
            loop.call_soon_threadsafe(print)
    Late()
    sys.exit(str(error))
"""


def test_a_checkpoint_that_cannot_be_written_is_one_line_and_harms_no_other(tmp_path, request):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), str(request.path.parent)], capture_output=True, text=True
    )
    assert done.returncode == 1
    reason = f"{tmp_path}: a checkpoint cannot be written (File too large); whole ones: 8; make room"
    assert done.stderr == f"{reason}, then give the same command again\n"
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.metadata() == {"images": 8}


# Saves 8 whole on a mesh of (2, 2), then is killed in the middle of saving 16.
KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
import jax
jax.config.update("jax_num_cpu_devices", 4)
from test_checkpoint import meshes, state, Checkpoints
mesh = meshes.make_mesh(data=2, fsdp=2)
checkpoints = Checkpoints(sys.argv[1], keep=2)
checkpoints.save(meshes.place(state(8), mesh), {"images": 8})
checkpoints.wait()
checkpoints.save(meshes.place(state(16), mesh), {"images": 16})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_in_a_save_and_restored_on_other_meshes(tmp_path, request):
    """Four devices wrote, two and one read: the same numbers. What the kill left is no checkpoint, and goes."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(request.path.parent)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    whole = [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]
    assert 8 in whole
    for devices, fsdp in ((jax.devices()[:2], 2), (jax.devices()[:2], 1), (jax.devices()[:1], 1)):
        mesh = meshes.make_mesh(fsdp=fsdp, devices=devices)
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            restored = checkpoints.restore(meshes.place(state(0), mesh))
            assert checkpoints.latest() == max(whole)
        assert_equal(restored, state(max(whole)))
        assert (
            restored.generator["a"]["kernel"].sharding == meshes.tree_shardings(restored, mesh).generator["a"]["kernel"]
        )
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("_")) == [str(n) for n in whole]


@pytest.mark.parametrize("lost", ["state", "ema", "metadata"])
def test_a_damaged_newest_checkpoint_is_named_and_so_is_the_one_beside_it(lost, tmp_path):
    mesh = meshes.make_mesh()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for images in (8, 16):
            checkpoints.save(meshes.place(state(images), mesh), {"images": images})
    for file in (tmp_path / "16" / lost).rglob("*"):  # half an rsync
        if file.is_file():
            file.unlink()
    with Checkpoints(tmp_path) as checkpoints:
        read = checkpoints.metadata if lost == "metadata" else lambda: checkpoints.restore(meshes.place(state(0), mesh))
        with pytest.raises(UserError, match=r"16: a damaged checkpoint .*; remove that folder to go on from 8") as told:
            read()
    reason = "metadata not found" if lost == "metadata" else f"({lost}/_METADATA is missing)"
    assert reason in str(told.value)
    assert "\n" not in str(told.value)
    shutil.rmtree(tmp_path / "16")
    with Checkpoints(tmp_path) as checkpoints:
        assert_equal(checkpoints.restore(meshes.place(state(0), mesh)), state(8))
