"""Corrupt records left out and counted, for those who say so."""

import pytest

from d2g_jax import records
from d2g_jax.runtime.errors import UserError


def corrupt(folder, manifest, *record_ids):
    source = records.PairSource(folder)
    for record_id in record_ids:
        path = next(
            folder / records.shard_name(shard, manifest.num_shards)
            for shard in range(manifest.num_shards)
            if record_id in records.shard_range(shard, manifest.num_shards, manifest.num_records)
        )
        data = bytearray(path.read_bytes())
        data[source.offset(record_id) + 60] ^= 1
        path.write_bytes(data)


def test_the_next_readable_record_stands_in(folder, manifest, caplog):
    corrupt(folder, manifest, 5, 6, 22)
    source = records.SkippingSource(records.PairSource(folder))
    assert [int(source[i]["id"]) for i in (4, 5, 6, 7, 22)] == [4, 7, 7, 7, 0]
    assert source.skipped == {5, 6, 22}
    assert len(source) == 23
    assert len(caplog.messages) == 1
    assert "corrupt record at byte" in caplog.text
    batch = next(iter(records.dataset(source, batch_size=23, seed=0)))
    assert set(batch["id"].tolist()) == set(range(23)) - {5, 6, 22}


def test_what_is_held_out_stays_so(folder, manifest):
    corrupt(folder, manifest, 4, 5, 20)
    source = records.SkippingSource(records.PairSource(folder), held_out=[5, 6, 21])
    assert [int(source[i]["id"]) for i in (4, 5, 20)] == [7, 6, 22]


def test_a_folder_without_a_readable_record(tmp_path, pairs):
    manifest = pairs.manifest_with(num_records=3, num_shards=1)
    folder = pairs.write_folder(tmp_path / "1.0.0", manifest)
    corrupt(folder, manifest, 0, 1, 2)
    with pytest.raises(UserError, match="corrupt record at byte"):
        records.SkippingSource(records.PairSource(folder))[0]
