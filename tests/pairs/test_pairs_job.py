"""What a record holds by config, records solved again, the estimate, and folders that cannot be written."""

import copy
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny import CONFIG, get_config

from d2g_jax import pairs, records
from d2g_jax.__main__ import main
from d2g_jax.diffusion import noise
from d2g_jax.pairs import estimate, resolve
from d2g_jax.pairs.job import load_teacher
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.records import framing
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.errors import UserError
from d2g_jax.train import setup
from d2g_jax.train import step as steps


def small_config(**changes):
    """As in test_jobs.py: the same programs."""
    c = get_config()
    c.pairs.update({"count": 20, "records_per_shard": 8, "steps": 3, "batch_size": 8, **changes})
    return c


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(config, pairs folder) of the plain choices"""
    workdir = tmp_path_factory.mktemp("plain")
    return small_config(), pairs.make_pairs(small_config(), workdir)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_storage_choice_at_once(made, tmp_path):
    _, plain = made
    folder = pairs.make_pairs(
        small_config(latent_dtype="bfloat16", store_noise=True, store_text=True), tmp_path / "pairs"
    )
    source, before = records.PairSource(folder), records.PairSource(plain)
    assert records.verify(folder) == []
    assert source.manifest.text_shapes == {"encoder_hidden_states": [20, 16]}
    record = source[13]
    assert record["latents"].dtype == record["encoder_hidden_states"].dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(record["latents"].astype(float), before[13]["latents"].astype(float), rtol=2**-7)
    np.testing.assert_array_equal(record["noise"], np.asarray(noise.record_noise(0, jnp.asarray([13]), (4, 16, 16)))[0])
    assert (source.manifest.num_prompts, source.manifest.num_distinct_prompts) == (4096, 4002)
    with pytest.raises(UserError, match="latent_dtype"):
        pairs.make_pairs(small_config(latent_dtype="float64"), tmp_path / "other")


@pytest.mark.parametrize("which", ["digits", "sdxl"])
def test_training_takes_the_stored_text_and_runs_no_tower(which, request, tmp_path):
    config = small_config(store_text=True, count=8)
    with config.unlocked():
        config.loss.name = "mse"
        config.adversarial.weight = 0.0
        if which == "sdxl":
            config.pipeline = str(request.getfixturevalue("tiny_sdxl"))
            config.pairs.update({"prompts": str(tmp_path / "prompts.txt"), "steps": 2, "solver": "euler"})
    (tmp_path / "prompts.txt").write_text("the cat\nthe dog\n")
    folder = pairs.make_pairs(config, tmp_path)
    source = setup.open_pairs(config, folder)
    batch = {name: np.stack([source[i][name] for i in range(8)]) for name in source[0]}
    batch["id"] = batch["id"].astype(np.uint32)
    whole = Pipeline.load(config.pipeline)
    bare = Pipeline.load(config.pipeline, without=("text_encoder", "text_encoder_2"))
    d, frozen = setup.build(config, bare, source.manifest)
    assert frozen.towers == {}
    stored = steps.condition(d, frozen, batch)
    manifest = dataclasses.replace(source.manifest, text_shapes={})
    encoded = steps.condition(*setup.build(config, whole, manifest), batch)
    assert jax.tree.structure(stored.text) == jax.tree.structure(encoded.text)
    for mine, towers in zip(jax.tree.leaves(stored.text), jax.tree.leaves(encoded.text), strict=True):
        assert mine.dtype == towers.dtype
        np.testing.assert_allclose(mine, towers, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("text", [[], [("encoder_hidden_states", (77, 768))]])
@pytest.mark.parametrize(("latent_dtype", "store_noise"), [("float16", False), ("bfloat16", True)])
def test_bytes_per_record_are_those_of_the_file(latent_dtype, store_noise, text):
    schema = records.PairSchema((4, 64, 64), 77, latent_dtype, store_noise, tuple(text))
    record = {name: np.zeros(shape, dtype) for name, (shape, dtype) in schema.tensors().items()}
    record |= {"id": 12_000_000, "noise_seed": 3, "noise_hash": -(2**62), "prompt": "a photograph of a cat"}
    size = len(framing.frame(schema.encode(record)))
    assert sum(schema.bytes_by_part().values()) == schema.bytes_per_record()
    assert abs(schema.bytes_per_record() + schema.overhead(21) - size) <= 12


def test_records_solved_again(made, tmp_path):
    """Equal to the bit; a wrong latent with right checksums is found by name and offset, and repaired."""
    config, plain = made
    assert resolve.resolve(config, plain, 6) == []
    folder = tmp_path / pairs.FOLDER
    shutil.copytree(plain, folder)
    source = records.PairSource(folder)
    manifest = source.manifest
    broken = [dict(source[i]) for i in range(6, 13)]  # shard 1 of 3
    broken[4]["latents"] = broken[4]["latents"] * np.float16(1.01)
    info = records.read_shard_info(folder, manifest, 1)
    records.write_shard(folder, manifest, 1, broken, info.made_on)
    assert records.verify(folder) == []  # nothing else can know
    (problem,) = resolve.resolve(config, folder, 20)
    assert (problem.file, problem.offset, problem.shard) == (info.name, records.PairSource(folder).offset(10), 1)
    assert "record 10" in problem.reason
    # Made elsewhere, one percent is within the tolerance; a tenth is not.
    records.write_shard(folder, manifest, 1, broken, "another device")
    assert resolve.resolve(config, folder, 20) == []
    broken[4]["latents"] = broken[4]["latents"] * np.float16(1.1)
    records.write_shard(folder, manifest, 1, broken, "another device")
    (problem,) = resolve.resolve(config, folder, 20)
    assert f"at most {resolve.TOLERANCE}" in problem.reason
    records.repair(folder, [problem])
    pairs.make_pairs(config, tmp_path)
    assert files(folder) == files(plain)


def test_a_solution_that_is_not_finite_agrees_with_nothing():
    stored = np.ones(4, np.float16)
    assert resolve._difference(stored, stored * np.float16(np.nan), exactly=False).startswith("differ by nan")


def test_records_of_another_config_are_not_solved_again(made):
    config, folder = made
    other = copy.deepcopy(config)
    other.pairs.guidance_scale = 5.0
    with pytest.raises(UserError, match=r"guidance_scale is 3\.0, this run has 5\.0"):
        resolve.resolve(other, folder, 1)
    with pytest.raises(UserError, match="--resolve=0"):
        resolve.resolve(config, folder, 0)


def test_estimate_writes_nothing(made, tmp_path, capsys):
    config, folder = made
    before = files(folder)
    fresh = estimate.estimate(config, tmp_path)
    assert (fresh.num_records, fresh.num_shards, fresh.missing) == (20, 3, 20)
    assert fresh.bytes_by_part.keys() == {"input_ids", "latents", "prompt, keys, framing"}
    made_bytes = sum(records.read_shard_info(folder, records.Manifest.read(folder), i).bytes for i in range(3))
    assert abs(sum(fresh.bytes_by_part.values()) - made_bytes / 20) < 12  # the mean prompt is that of all 4,096
    assert fresh.seconds_per_image > 0
    # Six network calls and a text tower; the UNet alone has some 27 MFLOP a call.
    assert fresh.flops_per_image > 6 * 1e7
    assert not list(tmp_path.iterdir())
    whole = estimate.estimate(config, folder.parents[1], timed=False)
    assert (whole.missing, files(folder)) == (0, before)
    text = str(fresh)
    assert "records     20 in 3 shards; 20 still to be made" in text
    assert "TPU v5p, 40% of its published 459 bf16 TFLOP/s" in text
    other = copy.deepcopy(config)
    other.pairs.seed = 1
    with pytest.raises(UserError, match="seed is 0, this run has 1"):
        estimate.estimate(other, folder.parents[1])


def test_flops_are_those_of_a_convolution():
    """XLA's own count for a program that can be counted by hand: 2 x 3 x 3 x 4 x 8 x 16 x 16, with padding less."""
    convolve = lambda w, x: jax.lax.conv_general_dilated(x, w, (1, 1), "VALID")  # noqa: E731
    arguments = jax.ShapeDtypeStruct((8, 4, 3, 3), jnp.float32), jax.ShapeDtypeStruct((1, 4, 18, 18), jnp.float32)
    assert estimate._flops(convolve, *arguments) == 2 * 3 * 3 * 4 * 8 * 16 * 16


def test_distinct_prompts_are_encoded_once(made, tmp_path):
    """30 records of 4 prompts: the towers see one batch, the records the embeddings that they would see alone."""
    config = small_config(pairs_per_prompt=3, count=12, records_per_shard=12)
    teacher = load_teacher(config)
    calls, encode = [], teacher.programs.encode
    counting = lambda ids: calls.append(ids.shape) or encode(ids)  # noqa: E731
    object.__setattr__(teacher, "programs", dataclasses.replace(teacher.programs, encode=counting))
    inputs = teacher.prepare(0)
    assert calls == [(8, 20)]
    assert inputs.rows.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    alone = encode(meshes.place_batch(inputs.input_ids[:8], teacher.mesh))
    np.testing.assert_array_equal(inputs.text_of(slice(8)).encoder_hidden_states, alone.encoder_hidden_states)


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 192 KiB; skips where it cannot be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("needs root, to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_stops_the_job_and_loses_nothing(made, small_disk):
    config, whole = made
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(136 * 1024))  # the first shard fits, the next do not
    config = copy.deepcopy(config)
    config.pairs.lease_seconds = 0.0
    with pytest.raises(UserError, match="No space left on device") as caught:
        pairs.make_pairs(config, small_disk)
    assert "\n" not in str(caught.value)
    folder = small_disk / pairs.FOLDER
    assert not list(folder.rglob("*.tmp"))
    ballast.unlink()
    pairs.make_pairs(config, small_disk)
    assert files(folder) == files(whole)


def test_a_read_only_folder_is_one_clear_line(made, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match="Read-only file system"):
        pairs.make_pairs(made[0], small_disk)


def test_a_dead_workers_claim_and_leftovers_are_cleared(made, tmp_path):
    """Here the process is gone, elsewhere the lease is over: both shards are made, the temporary file goes."""
    config, whole = made
    folder = tmp_path / pairs.FOLDER
    shutil.copytree(whole, folder)
    for file in [*folder.glob("*00001-of-*"), *folder.glob("*00002-of-*")]:
        file.unlink()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (folder / "claims").mkdir()
    claim = '{"worker": "w", "host": "%s", "pid": %d, "time": %f}'
    (folder / "claims" / "00001.json").write_text(claim % (os.uname().nodename, gone.pid, 4e9))
    (folder / "claims" / "00002.json").write_text(claim % ("elsewhere", 1, 0.0))
    (folder / ".pairs-train.tfrecord-00001-of-00003.abcd.tmp").write_bytes(b"half")
    pairs.make_pairs(config, tmp_path)
    assert files(folder) == files(whole)


def test_an_output_folder_with_another_data_set_is_left_alone(made, tmp_path):
    folder = tmp_path / pairs.FOLDER
    folder.mkdir(parents=True)
    (folder / "cats-train.tfrecord-00000-of-00001").write_bytes(b"cats")
    with pytest.raises(UserError, match=r"holds shards but no manifest\.json; choose another folder"):
        pairs.make_pairs(made[0], tmp_path)
    assert files(folder) == {"cats-train.tfrecord-00000-of-00001": b"cats"}


def test_command_line(made, tmp_path, capsys):
    _, folder = made
    settings = ["count=20", "records_per_shard=8", "steps=3", "batch_size=8"]
    flags = [f"--config.pairs.{setting}" for setting in settings]
    assert main(["pairs", CONFIG, "--dry-run", f"--workdir={tmp_path / 'none'}", *flags]) == 0
    assert "20 in 3 shards" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()
    assert main(["pairs", "verify", str(folder), "--resolve=2", CONFIG, *flags]) == 0
    assert "all good" in capsys.readouterr().out
    assert main(["pairs", "verify", str(folder), "--resolve=2", CONFIG]) == 2
    assert "this run has" in capsys.readouterr().err
    assert Path(folder, "manifest.json").exists()
