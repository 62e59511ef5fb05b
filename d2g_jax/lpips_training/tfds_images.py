"""Images of a prepared TFDS folder, read without TensorFlow: TFRecord or ArrayRecord files of `tf.train.Example`."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from d2g_jax.inputs.images import read_rgb
from d2g_jax.inputs.text import read_json
from d2g_jax.lpips_training.images import Images
from d2g_jax.records.framing import FrameError, scan, unframe
from d2g_jax.runtime.errors import UserError

IMAGE, LABEL = "image", "label"
TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
"""TFDS' own, and the only layout of file names that is read."""


def open_tfds(folder: Path, split: str) -> Images:
    """One split of the dataset in `folder`, which has the features `image` (PNG or JPEG) and `label` (ClassLabel).

    Raises `UserError` for other features, an unknown split or file format and a missing shard.
    """
    remedy = "give a folder that TFDS prepared"
    info, features = (read_json(folder / name, remedy) for name in ("dataset_info.json", "features.json"))
    classes = _classes(folder, features)
    file_format = info.get("fileFormat", "tfrecord")
    if file_format not in ("tfrecord", "array_record"):
        raise UserError(f"{folder}: file format {file_format!r} is not read; prepare it as tfrecord or array_record")
    splits = {entry["name"]: entry for entry in info.get("splits", [])}
    if split not in splits:
        raise UserError(
            f"{folder}: has no split {split!r}, only {', '.join(splits)}; set images.train_split, val_split"
        )
    if splits[split].get("filepathTemplate", TEMPLATE) != TEMPLATE:
        raise UserError(f"{folder}: files of split {split!r} are not named {TEMPLATE}; prepare it again with TFDS")
    counts = [int(length) for length in splits[split].get("shardLengths", ())]
    if not sum(counts):
        raise UserError(f"{folder}: split {split!r} is empty; prepare it again or choose another")
    paths = [folder / f"{info['name']}-{split}.{file_format}-{i:05d}-of-{len(counts):05d}" for i in range(len(counts))]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: shard is missing; prepare the dataset again")
    record = _array_record(paths, counts) if file_format == "array_record" else _TfRecords(paths, counts).read
    digest = hashlib.sha256(json.dumps([info["name"], info.get("version"), split, counts]).encode()).hexdigest()
    name = lambda row: f"{folder}, split {split}, record {row}"  # noqa: E731
    read = lambda row: _decode(record(row), len(classes), name(row))  # noqa: E731
    return Images(folder, sum(counts), classes, read, name, digest)


def _classes(folder: Path, features: dict[str, Any]) -> tuple[str, ...]:
    """Names of the classes; their numbers where TFDS wrote no names."""
    known = features.get("featuresDict", {}).get("features", {})
    if "image" not in known.get(IMAGE, {}) or "classLabel" not in known.get(LABEL, {}):
        raise UserError(
            f"{folder / 'features.json'}: needs the features image (Image) and label (ClassLabel), has "
            f"{', '.join(known) or 'none'}"
        )
    count = int(known[LABEL]["classLabel"].get("numClasses", 0))
    if count < 2:
        raise UserError(f"{folder / 'features.json'}: label has {count} classes; a classifier needs two or more")
    names = folder / f"{LABEL}.labels.txt"
    if names.is_file():
        return tuple(line for line in names.read_text(encoding="utf-8").splitlines() if line.strip())
    return tuple(str(i) for i in range(count))


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
