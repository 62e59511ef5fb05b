"""Random access, verification and repair."""

import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from d2g_jax import records
from d2g_jax.diffusion import noise
from d2g_jax.records import framing, shards, source
from d2g_jax.runtime.errors import UserError

NAMES = [records.shard_name(shard, 3) for shard in range(3)]


def flip(path, offset, bit=1):
    data = bytearray(path.read_bytes())
    data[offset] ^= bit
    path.write_bytes(data)


def offsets_of(path):
    return np.load(f"{path}.index.npy").tolist()


def test_every_record_in_any_order(folder, manifest, pairs):
    pairs_source = records.PairSource(folder)
    assert len(pairs_source) == 23
    for record_id in (22, 0, 7, 6, 14, 15, *range(23)):
        for name, value in pairs.make_record(manifest, record_id).items():
            np.testing.assert_array_equal(pairs_source[record_id][name], value)
    for record_id in (-1, 23):
        with pytest.raises(IndexError):
            pairs_source[record_id]
    assert records.PairSource(folder, ["latents"])[3].keys() == {"latents"}
    with pytest.raises(UserError, match="no field 'latent'"):
        records.PairSource(folder, ["latent"])


def test_threads_pickles_and_few_open_files(folder, monkeypatch):
    monkeypatch.setattr(source, "_MAX_OPEN_FILES", 1)
    pairs_source = records.PairSource(folder)
    with ThreadPoolExecutor(4) as pool:
        ids = [int(record["id"]) for record in pool.map(pairs_source.__getitem__, list(range(23)) * 8)]
    assert ids == list(range(23)) * 8
    assert pickle.loads(pickle.dumps(pairs_source))[9]["id"] == 9


@pytest.mark.parametrize("damage", ["absent", "cut", "empty", "of another file"])
def test_index_is_remade(folder, damage):
    path = shards.index_path(folder / NAMES[1])
    whole = path.read_bytes()
    if damage == "absent":
        path.unlink()
    elif damage == "of another file":
        np.save(path, np.load(path) + 1)
    else:
        path.write_bytes(whole[:100] if damage == "cut" else b"")
    assert records.PairSource(folder)[12]["id"] == 12
    assert path.read_bytes() == whole


def test_index_that_cannot_be_kept(folder, monkeypatch, caplog):
    def refuse(path, offsets):
        raise UserError(f"{path}: cannot be written")

    shards.index_path(folder / NAMES[0]).unlink()
    monkeypatch.setattr(source, "write_index", refuse)
    assert records.PairSource(folder)[2]["id"] == 2
    assert "index not kept" in caplog.text


def test_flipped_bit(folder, manifest, pairs):
    path = folder / NAMES[1]
    whole, start = path.read_bytes(), offsets_of(path)[3]
    for place in (start + 2, start + 9, start + 60, offsets_of(path)[4] - 1):  # length, its CRC, data, its CRC
        flip(path, place)
        broken = records.PairSource(folder)
        with pytest.raises(UserError, match=f"{path}: corrupt record at byte {start} .* --repair`") as caught:
            broken[10]
        assert "\n" not in str(caught.value)
        assert broken[9]["id"] == 9
        problems = records.verify(folder)
        assert [(p.file, p.offset, p.shard) for p in problems] == [(NAMES[1], start, 1)]
        path.write_bytes(whole)
    assert records.verify(folder) == []


def test_truncated_file_is_repaired(folder, manifest, pairs):
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    path = folder / NAMES[2]
    start = offsets_of(path)[-2]
    path.write_bytes(whole[NAMES[2]][:-5])
    with pytest.raises(UserError, match=f"{NAMES[2]}: .* bytes, written with .* --repair`"):
        records.PairSource(folder)
    problems = records.verify(folder)
    assert (NAMES[2], start, 2) in [(p.file, p.offset, p.shard) for p in problems]
    removed = records.repair(folder, problems)
    assert {file.name for file in removed} == {NAMES[2], f"{NAMES[2]}.json", f"{NAMES[2]}.index.npy"}
    assert records.missing_shards(folder, manifest) == [2]
    with pytest.raises(UserError, match=f"{NAMES[2]}: shard is missing"):
        records.PairSource(folder)
    pairs.write_folder(folder, manifest)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole


def test_an_index_that_is_wrong_in_its_middle_is_found_and_removed_alone(folder):
    path = shards.index_path(folder / NAMES[1])
    whole, offsets = path.read_bytes(), np.load(path)
    offsets[3] += 1
    np.save(path, offsets)
    with pytest.raises(UserError, match="corrupt record"):
        records.PairSource(folder)[10]
    problems = records.verify(folder)
    assert [str(p) for p in problems] == [f"{path.name}: byte 0: not where the records of the shard start"]
    assert records.repair(folder, problems) == [path]
    assert records.PairSource(folder)[10]["id"] == 10
    assert path.read_bytes() == whole
    assert records.verify(folder) == []
    path.write_bytes(whole.replace(b"}", b" "))  # no array at all: made anew by whoever reads
    assert records.verify(folder) == []
    assert records.PairSource(folder)[10]["id"] == 10
    assert path.read_bytes() == whole
    path.write_bytes(whole.replace(b"<i8", b"|V8"))
    assert len(records.verify(folder)) == 1


def test_verify_finds_what_checksums_cannot(tmp_path, pairs):
    """Shards that are whole but wrong, framed anew with right checksums."""
    manifest = pairs.manifest_with(store_noise=True)
    folder = pairs.write_folder(tmp_path / "1.0.0", manifest)
    assert records.verify(folder) == []

    def rewrite(changes):
        framed = [
            framing.frame(manifest.schema().encode(pairs.make_record(manifest, i) | changes(i))) for i in range(7)
        ]
        (folder / NAMES[0]).write_bytes(b"".join(framed))

    other_noise = np.zeros(manifest.latent_shape, np.float16)
    faults = [
        (lambda i: {"id": i + (i == 2)}, "id 3 at place 2"),
        (lambda i: {"noise_seed": 8 if i == 2 else 7}, "noise_seed is 8"),
        (lambda i: {"latents": other_noise + np.inf} if i == 2 else {}, "latents of record 2 are not finite"),
        (
            lambda i: {"noise_hash": pairs.make_record(manifest, 2)["noise_hash"] ^ 1} if i == 2 else {},
            "record 2 has another hash",
        ),
        (lambda i: {"noise": other_noise} if i == 2 else {}, "noise of record 2 is not the noise"),
        (lambda i: {"latents": other_noise} if i == 2 else {}, "crc32c is"),
    ]
    for changes, message in faults:
        rewrite(changes)
        reasons = [p.reason for p in records.verify(folder)]
        assert any(message in reason for reason in reasons), (message, reasons)


def test_latents_of_float32_are_finite_too(tmp_path, pairs, monkeypatch):
    manifest = pairs.manifest_with(latent_dtype="float32")
    broken = [pairs.make_record(manifest, i) for i in range(7)]
    broken[4]["latents"] = np.full_like(broken[4]["latents"], np.inf)
    manifest.write(tmp_path)
    with pytest.raises(UserError, match="latents of record 4 are not finite"):
        records.write_shard(tmp_path, manifest, 0, broken)
    monkeypatch.setattr(shards.PairSchema, "floats", lambda self: ())  # as a writer from before
    records.write_shard(tmp_path, manifest, 0, broken)
    monkeypatch.undo()
    assert [p.reason for p in records.verify_shard(tmp_path, manifest, 0)] == ["latents of record 4 are not finite"]


def test_repair_removes_old_leftovers_only(folder):
    old, fresh = folder / ".a.tmp", folder / ".b.tmp"
    old.write_bytes(b"x")
    fresh.write_bytes(b"x")
    os.utime(old, (0, 0))
    assert records.repair(folder, []) == [old]
    assert fresh.exists()


def test_noise_hash_belongs_to_the_bits(folder):
    record = records.PairSource(folder)[5]
    bits = np.asarray(noise.record_bits(int(record["noise_seed"]), np.asarray([5]), (2, 4, 3)))[0]
    assert noise.bits_hash(bits) == record["noise_hash"]


def test_neither_tensorflow_nor_torch_is_imported(tmp_path):
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]); import conftest as c\n"
        "from d2g_jax import records; folder = Path(sys.argv[1])\n"
        "c.write_folder(folder, c.manifest_with()); records.verify(folder)\n"
        "next(iter(records.dataset(records.PairSource(folder), batch_size=4, seed=0)))\n"
        "bad = {'tensorflow', 'torch', 'diffusers'} & sys.modules.keys(); sys.exit(str(bad) if bad else 0)"
    )
    here = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "1.0.0"), here], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("count", "wanted", "kept"), [(1000, 64, 64), (100, 64, 10), (9, 64, 0), (50, 0, 0)])
def test_records_kept_out_and_the_rest_are_all_records_once(count, wanted, kept):
    ids = records.held_out(count, wanted)
    assert len(set(ids)) == len(ids) == kept
    assert all(0 <= i < count for i in ids)
    rest = records.Rest(range(count), ids)
    assert sorted([*ids, *(rest[i] for i in range(len(rest)))]) == list(range(count))
    assert [rest[i] for i in range(len(rest))] == sorted(rest[i] for i in range(len(rest)))
