"""Reference statistics: the features of real images with the protocol and the weights that they were taken by."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from d2g_jax.evaluate.features import FrozenNetwork
from d2g_jax.evaluate.images import Survey, batches, prepare
from d2g_jax.evaluate.protocols import Protocol
from d2g_jax.inputs.arrays import DAMAGED
from d2g_jax.lpips_training.tfds_images import open_tfds
from d2g_jax.runtime import atomic
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.progress import Progress

_FIELDS = ("protocol", "protocol_sha256", "extractor", "weights_sha256", "images_sha256", "formats")


@dataclasses.dataclass(frozen=True)
class Reference:
    """Features of the images that generated ones are compared with.

    Attributes:
      features: float32 (N, D).
      protocol, protocol_sha256: by which the images were prepared.
      extractor, weights_sha256: whose features these are.
      images_sha256: of all images' bytes, in order: what a reference is known by.
      formats: of the image files, and how many of each.
      source: the file or folder it was read from.
    """

    features: np.ndarray
    protocol: str
    protocol_sha256: str
    extractor: str
    weights_sha256: str
    images_sha256: str
    formats: dict[str, int]
    source: str

    def __len__(self) -> int:
        return len(self.features)

    def describe(self) -> dict[str, Any]:
        """For the result file: everything but the features."""
        described = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**described, "features": list(self.features.shape)}


def save(file: Path, references: Mapping[str, Reference], protocol: Protocol) -> None:
    """Writes a .npz file of one folder's features by space, whole or not at all; 8 KB for each image and Inception."""
    arrays: dict[str, np.ndarray] = {}
    for space, one in references.items():
        described = {name: getattr(one, name) for name in _FIELDS}
        features_key, described_key = _keys(space, protocol)
        arrays |= {features_key: one.features, described_key: np.array(json.dumps(described))}
    with atomic.replacing(file) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays)


def _keys(space: str, protocol: Protocol) -> tuple[str, str]:
    """Of the arrays in a file; those of the protocol's own features have no prefix."""
    prefix = "" if space == protocol.features else f"{space}_"
    return f"{prefix}features", f"{prefix}described"


def read_reference(path: Path, protocol: Protocol, extractor: FrozenNetwork, space: str) -> Reference:
    """The features of a space from a file of `save`.

    Raises `UserError` for another protocol's statistics, for those of another network, and for a damaged file.
    """
    reference = _from_file(path, *_keys(space, protocol))
    again = "make them again with `d2g evaluate reference`"
    if reference.protocol_sha256 != protocol.sha256:
        version = "another version of it" if reference.protocol == protocol.name else reference.protocol
        raise UserError(f"{path}: statistics of the protocol {version}, not of {protocol.name}; {again}")
    if reference.weights_sha256 != extractor.sha256:
        raise UserError(
            f"{path}: features of other weights ({reference.weights_sha256[:12]}, these are {extractor.sha256[:12]}); "
            f"{again}"
        )
    return reference


def digits_reference(protocol: Protocol, extractors: Mapping[str, FrozenNetwork], batch: int) -> dict[str, Reference]:
    """Of 2,000 real scenes, which the package draws, by space: as the demo's "to real"."""
    from d2g_jax.digits.scenes import real_scenes

    images = real_scenes().images
    digest = hashlib.sha256(images.tobytes()).hexdigest()
    source = f"scikit-learn's digits in front of textures, {len(images)} images"
    parts = (images[first : first + batch] for first in range(0, len(images), batch))
    features = _features(parts, len(images), extractors)
    return _describe(features, protocol, extractors, digest, {"array": len(images)}, source)


def measure_reference(
    found: Survey, protocol: Protocol, extractors: Mapping[str, FrozenNetwork], batch: int
) -> dict[str, Reference]:
    """By space, the features of a folder of real images, which are read once, `batch` at a time."""
    features = _features((images for _, images in batches(found, protocol, batch)), len(found), extractors)
    return _describe(features, protocol, extractors, found.sha256, found.formats, str(found.folder))


def measure_dataset(
    folder: Path, protocol: Protocol, extractors: Mapping[str, FrozenNetwork], batch: int
) -> dict[str, Reference]:
    """The same of the split "train" of a folder that TFDS prepared; known by the hash of its pixels.

    Raises `UserError` as `open_tfds`, and for an image of another size than a protocol's that resizes nothing.
    """
    found, digest = open_tfds(folder, "train"), hashlib.sha256()

    def parts() -> Iterator[np.ndarray]:
        for first in range(0, found.count, batch):
            rows = range(first, min(first + batch, found.count))
            images = [prepare(found.read(row)[0], protocol) for row in rows]
            for row, image in zip(rows, images, strict=True):
                if image.shape[:2] != (protocol.size, protocol.size):
                    sides = f"{image.shape[1]}x{image.shape[0]} pixels"
                    raise UserError(
                        f"{found.name(row)}: {sides}; {protocol.name} takes {protocol.size} and resizes nothing"
                    )
            stacked = np.stack(images)
            digest.update(stacked.tobytes())
            yield stacked

    features, formats = _features(parts(), found.count, extractors), {"TFDS": found.count}
    return _describe(features, protocol, extractors, digest.hexdigest(), formats, f"{folder}, split train")


def _features(
    parts: Iterable[np.ndarray], count: int, extractors: Mapping[str, FrozenNetwork]
) -> dict[str, list[np.ndarray]]:
    """By space, those of batches of `count` images in all."""
    features: dict[str, list[np.ndarray]] = {space: [] for space in extractors}
    with Progress("reference", count, "image") as progress:
        for images in parts:
            for space, extractor in extractors.items():
                features[space].append(extractor.run(images))
            progress.advance(len(images))
    return features


def _describe(
    features: Mapping[str, list[np.ndarray]],
    protocol: Protocol,
    extractors: Mapping[str, FrozenNetwork],
    *images: Any,
) -> dict[str, Reference]:
    names = protocol.name, protocol.sha256
    return {
        space: Reference(np.concatenate(features[space]), *names, extractor.name, extractor.sha256, *images)
        for space, extractor in extractors.items()
    }


def _from_file(file: Path, features_key: str, described_key: str) -> Reference:
    wanted = "give a file of `d2g evaluate reference` or a folder of images"
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            if described_key not in arrays or features_key not in arrays:
                lacking = f"no {features_key} of a known protocol"
                raise UserError(f"{file}: statistics with {lacking} (it holds {', '.join(arrays)}); {wanted}")
            described, features = json.loads(str(arrays[described_key])), arrays[features_key]
            reference = Reference(features, *(described[name] for name in _FIELDS), str(file))
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file or folder; {wanted}") from error
    except DAMAGED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file}: cannot be read as reference statistics ({reason}); {wanted}") from error
    _check(reference, f"{file}: cannot be read as reference statistics", wanted)
    return reference


def _check(reference: Reference, what: str, wanted: str) -> None:
    for name in _FIELDS:
        kind = dict if name == "formats" else str
        if not isinstance(value := getattr(reference, name), kind):
            raise UserError(f"{what} ({name} is {value!r}, not a {kind.__name__}); {wanted}")
    shape, dtype = reference.features.shape, reference.features.dtype
    if len(shape) != 2 or not shape[0] or dtype.kind != "f":
        raise UserError(f"{what} (features are {dtype} of shape {shape}, not floats (N, D)); {wanted}")
    if not np.isfinite(reference.features).all():
        raise UserError(f"{what} (features hold NaN or infinity); {wanted}")
