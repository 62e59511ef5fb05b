"""The two files that make a folder of shards a dataset of TFDS."""

from __future__ import annotations

import tempfile
from pathlib import Path

from d2g_jax.records.files import write_atomic
from d2g_jax.records.manifest import Manifest
from d2g_jax.records.schema import DATASET, SPLIT, VERSION
from d2g_jax.records.shards import ShardInfo, read_shard_info
from d2g_jax.runtime import buckets


def write_metadata(folder: Path, manifest: Manifest) -> None:
    """Writes `features.json` and `dataset_info.json`, so that `tfds.builder_from_directory(folder)` reads the shards.

    Call it when all shards are done; raises `UserError` when one is not. The files hold no dates: the same shards give
    the same bytes.
    """
    shards = [read_shard_info(folder, manifest, index) for index in range(manifest.num_shards)]
    with tempfile.TemporaryDirectory() as scratch:  # TFDS writes in place; whole files move from here
        _write_info(Path(scratch), manifest, shards)
        for name in ("features.json", "dataset_info.json"):
            write_atomic(buckets.as_path(folder) / name, [Path(scratch, name).read_bytes()])


def _write_info(folder: Path, manifest: Manifest, shards: list[ShardInfo]) -> None:
    import tensorflow_datasets as tfds  # a second of import that only the end of the pair job needs

    identity = tfds.core.DatasetIdentity(
        name=DATASET, version=tfds.core.Version(VERSION), data_dir=str(folder), module_name=""
    )
    description = f"Noise, prompts and {manifest.num_inference_steps}-step latents of {manifest.teacher}."
    info = tfds.core.DatasetInfo(builder=identity, features=manifest.schema().features(), description=description)
    info.set_file_format("tfrecord")
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=DATASET, split=SPLIT, filetype_suffix="tfrecord"
    )
    split = tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=[shard.count for shard in shards],
        num_bytes=sum(shard.bytes for shard in shards),
        filename_template=template,
    )
    info.set_splits(tfds.core.SplitDict([split]))
    info.write_to_directory(folder)
