"""Images of a prepared TFDS folder, read without TensorFlow: TFRecord or ArrayRecord files of `tf.train.Example`."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from d2g_jax.inputs.images import read_rgb
from d2g_jax.inputs.tfds_folders import dataset_info
from d2g_jax.lpips_training.images import Images
from d2g_jax.records.framing import FrameError, scan, unframe
from d2g_jax.runtime.errors import UserError

IMAGE, LABEL = "image", "label"


def open_tfds(folder: Path, split: str) -> Images:
    """One split of the dataset in `folder`, which has the features `image` (PNG or JPEG) and `label` (ClassLabel).

    Raises `UserError` for metadata that TFDS does not read, other features, an unknown split or file format and a
    missing shard.
    """
    info = dataset_info(folder, "prepare the dataset again")
    files = {name: [Path(file) for file in one.filepaths] for name, one in info.splits.items()}
    classes = _classes(folder, info.features)
    file_format = info.file_format.value
    if file_format not in ("tfrecord", "array_record"):
        raise UserError(f"{folder}: file format {file_format!r} is not read; prepare it as tfrecord or array_record")
    if split not in files:
        raise UserError(f"{folder}: has no split {split!r}, only {', '.join(files)}; set images.train_split, val_split")
    paths, counts = files[split], info.splits[split].shard_lengths
    if not sum(counts):
        raise UserError(f"{folder}: split {split!r} is empty; prepare it again or choose another")
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: shard is missing; prepare the dataset again")
    record = _array_record(paths, counts) if file_format == "array_record" else _TfRecords(paths, counts).read
    digest = hashlib.sha256(json.dumps([info.name, str(info.version), split, counts]).encode()).hexdigest()
    name = lambda row: f"{folder}, split {split}, record {row}"  # noqa: E731
    read = lambda row: _decode(record(row), len(classes), name(row))  # noqa: E731
    return Images(folder, sum(counts), classes, read, name, digest)


def _classes(folder: Path, features: tfds.features.FeatureConnector) -> tuple[str, ...]:
    """Names of the classes; their numbers where TFDS wrote no names."""
    known = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    image, label = known.get(IMAGE), known.get(LABEL)
    if not isinstance(image, tfds.features.Image) or not isinstance(label, tfds.features.ClassLabel):
        raise UserError(
            f"{folder / 'features.json'}: needs the features image (Image) and label (ClassLabel), has "
            f"{', '.join(known) or 'none'}"
        )
    names = tuple(label.names) if label.num_classes else ()
    if len(names) < 2:
        raise UserError(f"{folder / 'features.json'}: label has {len(names)} classes; a classifier needs two or more")
    return names


def _array_record(paths: list[Path], counts: list[int]) -> Callable[[int], bytes]:
    from array_record.python.array_record_data_source import ArrayRecordDataSource  # grain's own reader

    source = ArrayRecordDataSource([f"{path}[0:{count}]" for path, count in zip(paths, counts, strict=True)])
    return lambda row: source[row]


@dataclasses.dataclass(frozen=True)
class _TfRecords:
    """Random access to framed records; where a shard's records start is found at its first use and kept."""

    paths: list[Path]
    counts: list[int]
    offsets: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)

    def read(self, row: int) -> bytes:
        ends = np.cumsum(self.counts)
        shard = int(np.searchsorted(ends, row, side="right"))
        path, place = self.paths[shard], row - int(ends[shard]) + self.counts[shard]
        try:
            if shard not in self.offsets:
                self.offsets[shard] = scan(path)
            if len(self.offsets[shard]) != self.counts[shard] + 1:
                raise FrameError(f"{len(self.offsets[shard]) - 1} records, dataset_info.json has {self.counts[shard]}")
            start, end = (int(offset) for offset in self.offsets[shard][place : place + 2])
            with path.open("rb") as file:
                file.seek(start)
                return unframe(file.read(end - start))
        except (FrameError, OSError) as error:
            raise UserError(f"{path}: corrupt at record {place} ({error}); prepare the dataset again") from error


def _decode(data: bytes, classes: int, name: str) -> tuple[Image.Image, int]:
    try:
        feature = tf_example_pb2.Example.FromString(data).features.feature
    except DecodeError as error:
        raise UserError(f"{name}: not an Example ({error}); prepare the dataset again") from error
    images, labels = feature[IMAGE].bytes_list.value, feature[LABEL].int64_list.value
    if len(images) != 1 or len(labels) != 1:
        raise UserError(f"{name}: holds {len(images)} images and {len(labels)} labels, expected one of each")
    if not 0 <= labels[0] < classes:
        raise UserError(f"{name}: label {labels[0]} is none of the {classes} classes; choose a split that has labels")
    return read_rgb(io.BytesIO(images[0]), name), int(labels[0])
