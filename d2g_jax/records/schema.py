"""What a record holds, and its bytes: one `tf.train.Example` per pair, tensors as raw little-endian bytes."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from d2g_jax.records.framing import frame

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

DATASET, SPLIT, VERSION = "pairs", "train", "1.0.0"
"""What TFDS calls the records; the version is that of their fields."""

LATENT_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

_INTEGERS = ("id", "noise_seed", "noise_hash")


@dataclass(frozen=True)
class PairSchema:
    """The fields of a record.

    `id`, `noise_seed`, `noise_hash` int64; `prompt` text; `input_ids` int32 (L,); `latents` (C, h, w) in
    `latent_dtype`, scaled by the VAE's factor; if `store_noise`, `noise` float16 (C, h, w); and what the text towers
    made of the prompt, in `latent_dtype`, under the names and in the shapes of `text`. Bits of the noise are drawn in
    the shape (C, h, w); `noise_hash` is `d2g_jax.diffusion.noise.bits_hash` of them.
    """

    latent_shape: tuple[int, int, int]  # (C, h, w)
    token_length: int  # L
    latent_dtype: str = "float16"  # a name of LATENT_DTYPES
    store_noise: bool = False
    text: tuple[tuple[str, tuple[int, ...]], ...] = ()  # (name, shape) of stored text embeddings

    def tensors(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of every field that is stored as bytes."""
        fields = {
            "input_ids": ((self.token_length,), np.dtype(np.int32)),
            "latents": (self.latent_shape, LATENT_DTYPES[self.latent_dtype]),
        }
        if self.store_noise:
            fields["noise"] = (self.latent_shape, np.dtype(np.float16))
        fields |= {name: (shape, LATENT_DTYPES[self.latent_dtype]) for name, shape in self.text}
        return fields

    def floats(self) -> tuple[str, ...]:
        """Names of the tensors that hold floats: their values must be finite."""
        return tuple(name for name in self.tensors() if name != "input_ids")

    def names(self) -> tuple[str, ...]:
        """Names of all fields."""
        return (*_INTEGERS, "prompt", *self.tensors())

    def bytes_per_record(self) -> int:
        """Bytes of the tensors of one record; prompt, keys and framing add about 150 and the prompt's length."""
        return sum(self.bytes_by_part().values())

    def bytes_by_part(self) -> dict[str, int]:
        """Bytes of each tensor of one record, under its name."""
        return {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in self.tensors().items()}

    def overhead(self, prompt_bytes: int) -> int:
        """Bytes that a record takes beside its tensors: prompt, integers, keys and framing; to within a few."""
        record = {name: np.zeros(shape, dtype) for name, (shape, dtype) in self.tensors().items()}
        record |= {"id": 2**20, "noise_seed": 0, "noise_hash": -1, "prompt": "x" * prompt_bytes}
        return len(frame(self.encode(record))) - self.bytes_per_record()

    def features(self) -> tfds.features.FeaturesDict:
        """The same as a TFDS feature tree."""
        import tensorflow_datasets as tfds  # a second of import that only the end of the pair job needs

        features = {name: tfds.features.Scalar(np.int64) for name in _INTEGERS}
        features["prompt"] = tfds.features.Text()
        for name, (shape, dtype) in self.tensors().items():
            features[name] = tfds.features.Tensor(shape=shape, dtype=dtype.type, encoding="bytes")
        return tfds.features.FeaturesDict(features)

    def encode(self, record: Mapping[str, Any]) -> bytes:
        """A record as a serialized Example: the same record gives the same bytes.

        Raises `ValueError` on a missing or unknown field, and on a tensor of another shape or dtype: nothing is cast.
        """
        if set(record) != set(self.names()):
            raise ValueError(f"a record with fields {sorted(record)}, expected {sorted(self.names())}")
        example = tf_example_pb2.Example()
        feature = example.features.feature
        for name in _INTEGERS:
            feature[name].int64_list.value.append(int(record[name]))
        feature["prompt"].bytes_list.value.append(str(record["prompt"]).encode())
        for name, (shape, dtype) in self.tensors().items():
            value = np.asarray(record[name])
            if value.shape != shape or value.dtype != dtype:
                raise ValueError(f"{name} is {value.dtype} {value.shape}, expected {dtype} {shape}")
            feature[name].bytes_list.value.append(value.tobytes())
        return example.SerializeToString(deterministic=True)

    def decode(self, data: bytes, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
        """A record from its bytes: integers and `prompt` as 0-d arrays, tensors read-only without a copy.

        `names` picks the fields to decode, all by default, of `names()`. Raises `ValueError` on bytes that are no such
        record.
        """
        try:
            feature = tf_example_pb2.Example.FromString(data).features.feature
        except DecodeError as error:
            raise ValueError(f"not an Example: {error}") from None
        record, layout = {}, self._layout
        for name in layout if names is None else names:
            value, shape, dtype = feature[name], *layout[name]
            values = value.int64_list.value if name in _INTEGERS else value.bytes_list.value
            if len(values) != 1:
                raise ValueError(f"field {name!r} holds {len(values)} values, expected 1")
            record[name] = _array(name, values[0], shape, dtype)
        return record

    @functools.cached_property
    def _layout(self) -> dict[str, tuple[tuple[int, ...] | None, np.dtype | None]]:
        """`tensors()` with the other fields, of which there is nothing to say, in the order of `names()`."""
        return dict.fromkeys(self.names(), (None, None)) | self.tensors()


def _array(name: str, value: int | bytes, shape: tuple[int, ...] | None, dtype: np.dtype | None) -> np.ndarray:
    if shape is None or dtype is None:
        return np.asarray(value.decode()) if isinstance(value, bytes) else np.asarray(value, np.int64)
    try:
        return np.frombuffer(value, dtype).reshape(shape)
    except ValueError:
        raise ValueError(f"field {name!r} holds {len(value)} bytes, {dtype} {shape} needs another number") from None
