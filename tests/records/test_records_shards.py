"""Schema, framing, manifest and the atomic writer."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from d2g_jax import records
from d2g_jax.records import framing
from d2g_jax.runtime.errors import UserError


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_masked_crc_known_value():
    # RFC 3720 B.4: CRC32C of 32 zero bytes is 0x8A9136AA; rotated and shifted by hand.
    crc = 0x8A9136AA
    assert framing.masked_crc(bytes(32)) == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32


def test_frame_round_trip_and_cut():
    framed = framing.frame(b"latents")
    assert framing.unframe(framed) == b"latents"
    with pytest.raises(framing.FrameError, match="announced"):
        framing.unframe(framed[:-1])
    with pytest.raises(framing.FrameError, match="header"):
        framing.unframe(framed[:5])


TEXT = {"encoder_hidden_states": [5, 6], "text_embeds": [7]}


@pytest.mark.parametrize(
    "changes",
    [{}, {"latent_dtype": "bfloat16"}, {"store_noise": True}, {"latent_dtype": "bfloat16", "text_shapes": TEXT}],
)
def test_record_round_trip(pairs, changes):
    manifest = pairs.manifest_with(**changes)
    schema, record = manifest.schema(), pairs.make_record(manifest, 3)
    decoded = schema.decode(schema.encode(record))
    assert decoded.keys() == record.keys() == set(schema.names())
    assert decoded["prompt"] == "a “digit” 3"
    for name, value in record.items():
        np.testing.assert_array_equal(decoded[name], value)
    assert decoded["latents"].dtype == {"bfloat16": ml_dtypes.bfloat16}.get(schema.latent_dtype, np.float16)
    assert schema.decode(schema.encode(record), ["id"]).keys() == {"id"}


def test_two_bytes_per_latent_value():
    schema = records.PairSchema((4, 64, 64), 77)
    assert schema.bytes_per_record() == 2 * 4 * 64 * 64 + 4 * 77
    record = {"id": 0, "prompt": "", "noise_seed": 0, "noise_hash": 0, "input_ids": np.zeros(77, np.int32)}
    size = len(schema.encode(record | {"latents": np.zeros((4, 64, 64), np.float16)}))
    assert size - schema.bytes_per_record() < 160


def test_encode_casts_nothing(pairs, manifest):
    record = pairs.make_record(manifest, 0)
    with pytest.raises(ValueError, match="latents is float32"):
        manifest.schema().encode(record | {"latents": record["latents"].astype(np.float32)})
    with pytest.raises(ValueError, match="latents is float16"):
        manifest.schema().encode(record | {"latents": record["latents"].transpose(1, 2, 0)})
    with pytest.raises(ValueError, match="fields"):
        manifest.schema().encode({"id": 0})


def test_shard_ranges_cover_every_id_once():
    ids = [i for shard in range(7) for i in records.shard_range(shard, 7, 23)]
    assert ids == list(range(23))
    assert records.shard_name(3, 10) == "pairs-train.tfrecord-00003-of-00010"


def test_same_records_same_bytes(tmp_path, folder, manifest, pairs):
    again = pairs.write_folder(tmp_path / "again" / "1.0.0", manifest)
    assert contents(again) == contents(folder)
    assert len(contents(folder)) == 3 * 3 + 3


def test_shard_info_says_what_the_file_is(folder, manifest):
    info = json.loads((folder / "pairs-train.tfrecord-00001-of-00003.json").read_text())
    shard = folder / info["name"]
    assert (info["count"], info["first_id"], info["last_id"]) == (8, 7, 14)
    assert info["bytes"] == shard.stat().st_size
    assert info["crc32c"] == framing.google_crc32c.value(shard.read_bytes())
    assert info["config_hash"] == manifest.config_hash
    assert {"d2g_jax", "jax", "numpy"} <= info["libraries"].keys()


def test_interrupted_writer_leaves_nothing_that_counts(tmp_path, manifest, pairs):
    def dying():
        yield pairs.make_record(manifest, 0)
        yield pairs.make_record(manifest, 1)
        raise KeyboardInterrupt

    manifest.write(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        records.write_shard(tmp_path, manifest, 0, dying())
    assert contents(tmp_path).keys() == {"manifest.json"}
    assert records.missing_shards(tmp_path, manifest) == [0, 1, 2]


def test_killed_writer_leaves_nothing_that_counts(tmp_path, folder, manifest, pairs):
    """A process that dies between the shard and its JSON, or with a temporary file open, has done nothing."""
    killed = tmp_path / "killed" / "1.0.0"
    manifest.write(killed)
    script = (
        "import os, sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]); import conftest as c\n"
        "from d2g_jax import records; m = c.manifest_with()\n"
        "def dying():\n    yield c.make_record(m, 0)\n    os.kill(os.getpid(), 9)\n"
        "records.write_shard(Path(sys.argv[1]), m, 0, dying())"
    )
    here = str(Path(__file__).parent)
    assert subprocess.run([sys.executable, "-c", script, str(killed), here]).returncode == -9
    name = records.shard_name(0, 3)
    assert any(file.startswith(f".{name}") for file in contents(killed))
    (killed / records.shard_name(1, 3)).write_bytes((folder / records.shard_name(1, 3)).read_bytes())
    assert records.missing_shards(killed, manifest) == [0, 1, 2]
    pairs.write_folder(killed, manifest)
    whole = {name: data for name, data in contents(killed).items() if not name.endswith(".tmp")}
    assert whole == contents(folder)


def test_writer_refuses_wrong_records(tmp_path, manifest, pairs):
    def shard(ids):
        return records.write_shard(tmp_path, manifest, 0, (pairs.make_record(manifest, i) for i in ids))

    for ids in (range(6), range(8), (0, 2, 1, 3, 4, 5, 6)):
        with pytest.raises(ValueError, match="00000-of-00003"):
            shard(ids)
    broken = [pairs.make_record(manifest, i) for i in range(7)]
    broken[4]["latents"] = np.full_like(broken[4]["latents"], np.nan)
    with pytest.raises(UserError, match="record 4 are not finite"):
        records.write_shard(tmp_path, manifest, 0, broken)
    assert contents(tmp_path) == {}


def test_full_disk_is_one_clear_line(tmp_path, manifest, pairs, monkeypatch):
    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(UserError, match=r"00000-of-00003: cannot be written \(No space left on device\)"):
        records.write_shard(tmp_path, manifest, 0, (pairs.make_record(manifest, i) for i in range(7)))
    assert contents(tmp_path) == {}


def test_manifest_round_trip_and_rerun(tmp_path, manifest, pairs):
    manifest.write(tmp_path / "1.0.0")
    manifest.write(tmp_path / "1.0.0")
    assert records.Manifest.read(tmp_path / "1.0.0") == manifest
    with pytest.raises(UserError, match="seed is 7, this run has 8"):
        pairs.manifest_with(seed=8).write(tmp_path / "1.0.0")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data.pop("solver"), "key 'solver' is missing"),
        (lambda data: data.update(colour=1), "unknown key 'colour'"),
        (lambda data: data.update(seed="7"), "seed = '7'; give int"),
        (lambda data: data.update(latent_shape=[2, 4]), r"latent_shape = \(2, 4\); give tuple"),
        (lambda data: data.update(latent_dtype="float64"), "latent_dtype = 'float64'"),
        (lambda data: data.update(num_shards=99), "num_shards = 99"),
        (lambda data: data.update(text_shapes={"text_embeds": [0]}), r"text_shapes.text_embeds = \[0\]"),
    ],
)
def test_broken_manifest(folder, edit, message):
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=message) as caught:
        records.PairSource(folder)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_folder_of_pairs(tmp_path, folder, manifest):
    with pytest.raises(UserError, match="not a folder of pairs"):
        records.PairSource(tmp_path)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json cannot be read"):
        records.PairSource(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="holds shards but no manifest"):
        manifest.write(folder)


def test_another_runs_shards_are_refused_and_kept(folder, manifest):
    (folder / "manifest.json").unlink()
    other = dataclasses.replace(manifest, config_hash="0" * 64)
    (folder / "manifest.json").write_text(json.dumps(dataclasses.asdict(other)))
    before = contents(folder)
    with pytest.raises(UserError, match="the manifest has 000000000000"):
        records.PairSource(folder)
    with pytest.raises(UserError, match="the manifest has 000000000000"):
        records.missing_shards(folder, other)
    problems = records.verify(folder)
    assert len(problems) == 3
    assert records.repair(folder, problems) == []
    assert contents(folder) == before


def test_check_fits(manifest):
    teacher = {
        "source": "pairs",
        "latent_shape": manifest.latent_shape,
        "token_length": 5,
        "scaling_factor": 0.18215,
        "scheduler": dict(manifest.scheduler) | {"clip_sample": False},
        "teacher_hash": manifest.teacher_hash,
    }
    records.check_fits(manifest, **teacher)
    wrong = {
        "latent_shape": (4, 64, 64),
        "token_length": 77,
        "scaling_factor": 0.13025,
        "scheduler": manifest.scheduler | {"prediction_type": "v_prediction"},
        "teacher_hash": "cd" * 32,
    }
    for name, value in wrong.items():
        with pytest.raises(UserError, match=name):
            records.check_fits(manifest, **teacher | {name: value})
    with pytest.raises(UserError, match="noise_implementation"):
        records.check_fits(dataclasses.replace(manifest, noise_implementation="torch"), **teacher)


@pytest.mark.parametrize("key", ["prediction_type", "beta_schedule", "num_train_timesteps"])
def test_a_default_that_is_left_out_is_the_same_schedule(manifest, key):
    own = {"prediction_type": "epsilon", "beta_schedule": "linear", "num_train_timesteps": 1000}
    pairs = dataclasses.replace(manifest, scheduler={k: v for k, v in own.items() if k != key})
    names = ("latent_shape", "token_length", "scaling_factor", "teacher_hash")
    teacher = {name: getattr(manifest, name) for name in names} | {"source": "pairs"}
    records.check_fits(pairs, scheduler=own, **teacher)
    with pytest.raises(UserError, match=f"scheduler.{key}"):
        records.check_fits(pairs, scheduler={**own, key: 7}, **teacher)


def test_a_teacher_that_was_moved_is_the_same(manifest, tmp_path):
    manifest.write(tmp_path)
    dataclasses.replace(manifest, teacher="moved").write(tmp_path)
    dataclasses.replace(manifest, scheduler={**manifest.scheduler, "_diffusers_version": "0.36.0"}).write(tmp_path)
    with pytest.raises(UserError, match="teacher_hash is"):
        dataclasses.replace(manifest, teacher_hash="other").write(tmp_path)
