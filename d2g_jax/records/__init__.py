"""The teacher's pairs on disk: TFRecord shards in TFDS layout, written atomically, read at random, checked.

    pairs/1.0.0/
      manifest.json                                       what made the pairs; written first
      pairs-train.tfrecord-00000-of-00010                 records of one fixed id range
      pairs-train.tfrecord-00000-of-00010.index.npy       where each record starts; remade when absent
      pairs-train.tfrecord-00000-of-00010.json            count, bytes, CRC; written last: the shard is done
      features.json, dataset_info.json                    so that `tfds.builder_from_directory` reads the folder

Neither TensorFlow nor torch is imported. Nothing here knows of teachers, losses or meshes.
"""

from d2g_jax.records.manifest import Manifest, check_fits, config_hash
from d2g_jax.records.metadata import write_metadata
from d2g_jax.records.schema import PairSchema
from d2g_jax.records.shards import (
    ShardInfo,
    is_whole,
    library_versions,
    missing_shards,
    read_shard_info,
    shard_name,
    shard_range,
    write_shard,
)
from d2g_jax.records.source import PairSource, Rest, SkippingSource, held_out
from d2g_jax.records.stream import dataset, record_index
from d2g_jax.records.verify import Problem, repair, verify, verify_shard

__all__ = [
    "Manifest", "PairSchema", "PairSource", "Problem", "Rest", "ShardInfo", "SkippingSource", "check_fits",
    "config_hash", "dataset", "held_out", "is_whole", "library_versions", "missing_shards", "read_shard_info",
    "record_index", "repair", "shard_name", "shard_range", "verify", "verify_shard", "write_metadata",
    "write_shard",
]  # fmt: skip
