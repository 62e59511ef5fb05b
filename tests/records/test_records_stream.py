"""The shuffled stream: every record once per epoch, position as one number, the same on any process count."""

import itertools

import numpy as np
import pytest

from d2g_jax import records
from d2g_jax.runtime.errors import UserError


def ids_of(source, batches, **options):
    iterator = iter(records.dataset(source, **options))
    taken = [batch["id"].tolist() for batch in itertools.islice(iterator, batches)]
    iterator.close()
    return taken


@pytest.mark.parametrize("count", [1, 2, 5, 23, 64, 3072])
def test_each_epoch_is_a_permutation(count):
    first, second = (records.record_index(3, epoch * count + np.arange(count), count) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(count))
    if count > 20:
        assert (first != second).any()
        assert (first != records.record_index(4, np.arange(count), count)).any()
        assert (first != np.arange(count)).any()


def test_shuffle_is_uniform_and_epochs_are_independent():
    """Where record 0..9 of 10 land over 4,000 epochs: every place equally often (chi-square, 81 degrees of freedom)."""
    epochs = 4000
    order = records.record_index(11, np.arange(10 * epochs), 10).reshape(epochs, 10)
    table = np.stack([(order == record).sum(0) for record in range(10)])
    assert ((table - epochs / 10) ** 2 / (epochs / 10)).sum() < 130  # p = 5e-4
    large = records.record_index(11, np.arange(200_000), 100_000).reshape(2, -1)
    assert abs(np.corrcoef(large)[0, 1]) < 0.02
    assert abs(np.corrcoef(large[0], np.arange(100_000))[0, 1]) < 0.02


def test_order_never_changes():
    """A resumed run must find the order it left: these numbers are part of the format of a checkpoint."""
    assert records.record_index(0, np.arange(8), 23).tolist() == [2, 0, 21, 3, 10, 9, 4, 22]
    assert records.record_index(2**40 + 1, np.asarray([10**12]), 12_000_000).tolist() == [6905713]


def test_stream_spans_epochs_and_drops_nothing(folder):
    flat = list(itertools.chain(*ids_of(records.PairSource(folder), 23, batch_size=4, seed=1)))
    assert len(flat) == 92
    for epoch in range(4):
        assert sorted(flat[epoch * 23 : (epoch + 1) * 23]) == list(range(23))


@pytest.mark.parametrize("rows", [[[*range(8)]], [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 3], [1, 2], [4, 7], [5, 6]]])
def test_resume_on_any_number_of_processes(folder, rows):
    """Whichever rows of a batch each process reads: the batches are those of one."""
    source = records.PairSource(folder, ["id", "latents"])
    whole = np.array(ids_of(source, 14, batch_size=8, seed=5))
    found = np.zeros((10, 8), int)
    for own in rows:
        found[:, own] = ids_of(source, 10, batch_size=8, seed=5, start=8 * 4, rows=np.array(own))
    assert found.tolist() == whole[4:].tolist()


def test_batches_hold_the_records(folder, manifest, pairs):
    batch = next(iter(records.dataset(records.PairSource(folder), batch_size=23, seed=2, num_threads=0)))
    assert batch["latents"].shape == (23, 2, 4, 3)
    assert batch["latents"].dtype == np.float16
    for row, record_id in enumerate(batch["id"]):
        for name, value in pairs.make_record(manifest, int(record_id)).items():
            np.testing.assert_array_equal(batch[name][row], value)


def test_corrupt_record_stops_the_stream_with_its_name(folder):
    path = folder / records.shard_name(0, 3)
    data = bytearray(path.read_bytes())
    data[100] ^= 4
    path.write_bytes(data)
    iterator = iter(records.dataset(records.PairSource(folder), batch_size=23, seed=0))
    with pytest.raises(UserError, match="corrupt record at byte 0"):
        next(iterator)
