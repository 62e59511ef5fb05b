"""Pairs in a bucket, which here is fsspec's file system in memory under the name gs://: no real bucket is tried."""

import importlib

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from tiny import get_config

from d2g_jax import pairs, records
from d2g_jax.pairs.claims import Claims
from d2g_jax.runtime import atomic, buckets
from d2g_jax.runtime.errors import UserError


class Bucket(MemoryFileSystem):
    """Answers to gs://NAME/KEY, with names such as gcsfs gives: without a slash in front."""

    protocol = ("gcs", "gs")
    store, pseudo_dirs = {}, [""]  # as in the parent: one for all instances
    puts = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs:/").removeprefix("gcs:/"))

    def glob(self, path, **options):
        return [name.lstrip("/") for name in super().glob(path, **options)]

    def put_file(self, lpath, rpath, **options):
        self.puts.append(rpath)
        return super().put_file(lpath, rpath, **options)


@pytest.fixture
def bucket(monkeypatch):
    """The store: key to file."""
    registry = importlib.import_module("fsspec.registry")._registry
    for name in Bucket.protocol:
        monkeypatch.setitem(registry, name, Bucket)
    Bucket.store.clear()
    Bucket.puts.clear()
    return Bucket.store


def config():
    c = get_config()
    c.pairs.update({"count": 20, "records_per_shard": 8, "steps": 3, "batch_size": 8, "lease_seconds": 60.0})
    return c


def content(store, folder):
    return {name.rsplit("/", 1)[1]: file.getvalue() for name, file in store.items() if folder in name}


def test_a_bucket_holds_what_a_folder_holds(bucket, tmp_path):
    local = pairs.make_pairs(config(), tmp_path)
    folder = pairs.make_pairs(config(), buckets.as_path("gs://pairs-of/mine"))
    assert str(folder) == "gs://pairs-of/mine/pairs/1.0.0"
    whole = {path.name: path.read_bytes() for path in local.iterdir()}
    assert content(bucket, "/mine/") == whole
    shards = [name for name in Bucket.puts if "-of-" in name]
    assert len(shards) == len(set(shards)) == 9  # each uploaded once, with its index and its JSON

    source, near = records.PairSource(str(folder)), records.PairSource(local)
    for record_id in (19, 0, 8):
        for name, value in near[record_id].items():
            np.testing.assert_array_equal(source[record_id][name], value)
    assert records.verify(str(folder)) == []
    # A flipped bit: found, removed, made again.
    name = next(name for name in bucket if name.endswith("00001-of-00003"))
    damaged = bytearray(bucket[name].getvalue())
    damaged[100] ^= 1
    bucket[name].seek(0)
    bucket[name].write(damaged)
    problems = records.verify(str(folder))
    assert [(problem.file, problem.offset) for problem in problems] == [("pairs-train.tfrecord-00001-of-00003", 0)]
    assert len(records.repair(str(folder), problems)) == 3
    pairs.make_pairs(config(), buckets.as_path("gs://pairs-of/mine"))
    assert content(bucket, "/mine/") == whole


def test_claims_in_a_bucket(bucket, tmp_path):
    folder = buckets.as_path("gs://pairs-of/claimed")
    manifest = records.Manifest.read(pairs.make_pairs(config(), tmp_path))
    with Claims(folder, manifest, 60.0) as first, Claims(folder, manifest, 60.0) as second:
        assert list(first.take([0, 1])) == [0, 1]
        assert list(second.take([0, 1, 2])) == [2]
        first.release(0)
        assert list(second.take([0, 1])) == [0]
    assert not content(bucket, "/claimed/")


def test_an_upload_that_fails_is_one_line(bucket, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "403 Forbidden")

    monkeypatch.setattr(Bucket, "put_file", refuse)
    with pytest.raises(UserError, match=r"gs://pairs-of/a: cannot be written \(403 Forbidden\)"):
        atomic.write_bytes("gs://pairs-of/a", b"a")
    assert not bucket


def test_other_addresses_are_refused():
    with pytest.raises(UserError, match="ftp://a: not a folder"):
        buckets.as_path("ftp://a")


@pytest.mark.parametrize(("address", "package"), [("gs://b/x", "gcsfs"), ("s3://b/x", "s3fs"), ("az://b/x", "adlfs")])
def test_a_bucket_whose_package_is_not_installed(address, package, monkeypatch):
    import fsspec.core

    def missing(*_, **__):
        raise ImportError(f"Please install {package}")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match=f"{address}: reading this bucket needs {package}; pip install {package}"):
        buckets.as_path(address).exists()
