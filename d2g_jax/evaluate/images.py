"""Folders of images as a protocol sees them: surveyed whole before anything is computed, then read in batches."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from d2g_jax.evaluate.protocols import Protocol
from d2g_jax.inputs import images
from d2g_jax.inputs.text import natural_key
from d2g_jax.runtime.errors import UserError

_FILTERS = {"lanczos": Image.Resampling.LANCZOS}
_THREADS = 8
_SHOWN = 3  # names in a message


class _File(NamedTuple):
    """What one file is: its PIL format, size (width, height), mode and SHA-256, or why it cannot be read."""

    format: str
    size: tuple[int, int]
    mode: str
    sha256: str
    fault: str | None = None


@dataclasses.dataclass(frozen=True)
class Survey:
    """A folder that has been read once from end to end.

    Attributes:
      folder: where.
      names: of readable images, in natural order (2.png before 10.png).
      indices: of these images among all, the corrupt ones counted: image i belongs to prompt i.
      corrupt: name and reason of each file that cannot be decoded.
      formats: PIL's names, such as PNG and JPEG, and how often each.
      size: (width, height) of all images, None where they differ.
      digests: SHA-256 of each readable image's bytes.
    """

    folder: Path
    names: tuple[str, ...]
    indices: tuple[int, ...]
    corrupt: dict[str, str]
    formats: dict[str, int]
    size: tuple[int, int] | None
    digests: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def sha256(self) -> str:
        """Of all readable images' bytes, in order."""
        return hashlib.sha256("".join(self.digests).encode()).hexdigest()

    def only(self, indices: Collection[int]) -> Survey:
        """What there is of these images, the corrupt ones counted; `formats` and `size` are the folder's."""
        kept = [place for place, index in enumerate(self.indices) if index in indices]
        parts = {name: tuple(getattr(self, name)[i] for i in kept) for name in ("names", "indices", "digests")}
        return dataclasses.replace(self, **parts)


def survey(folder: str | Path, protocol: Protocol, *, max_corrupt: int | None = None, mixed: bool = False) -> Survey:
    """Decodes every image of a folder.

    Args:
      folder: holds .png, .jpg or .jpeg; `grid.png` is no sample.
      protocol: whose size the images must have if it does not resize.
      max_corrupt: files that may be unreadable, and are then left out and named; None for none, whatever is asked for.
      mixed: whether sizes, formats and modes may differ, as in a data set of photographs.

    Raises:
      UserError: no such folder, no images, too many corrupt files, images of several sizes, formats or modes, images
        that have another size than the protocol's, transparency.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one of images ({', '.join(images.SUFFIXES)})")
    every = [file.name for file in images.image_files(folder.iterdir())]
    every.sort(key=natural_key)
    if not every:
        raise UserError(f"{folder}: holds no image ({', '.join(images.SUFFIXES)})")
    with ThreadPoolExecutor(_THREADS) as pool:
        files = dict(zip(every, pool.map(lambda name: _examine(folder / name), every), strict=True))
    corrupt = {name: file.fault for name, file in files.items() if file.fault is not None}
    if len(corrupt) > (max_corrupt or 0):
        remedy = "" if max_corrupt is None else f", or leave them out with --max-corrupt={len(corrupt)}"
        raise UserError(
            f"{folder}: {len(corrupt)} of {len(every)} images cannot be read: {_listed(list(corrupt))}; make them "
            f"again{remedy}"
        )
    good = {name: file for name, file in files.items() if file.fault is None}
    if not good:
        raise UserError(f"{folder}: none of {len(every)} images can be read")
    if not mixed:
        for what, key in (("sizes", "size"), ("modes", "mode"), ("formats", "format")):
            _check_one(folder, what, {name: getattr(file, key) for name, file in good.items()})
    if protocol.resize is None:
        for name, file in good.items():
            if file.size != (protocol.size, protocol.size):
                raise UserError(
                    f"{folder / name} is {_text(file.size)} pixels; the protocol {protocol.name} resizes nothing and "
                    f"takes {protocol.size}x{protocol.size}"
                )
    sizes = {file.size for file in good.values()}
    return Survey(
        folder,
        tuple(good),
        tuple(index for index, name in enumerate(every) if name in good),
        corrupt,
        dict(Counter(file.format for file in good.values()).most_common()),
        sizes.pop() if len(sizes) == 1 else None,
        tuple(file.sha256 for file in good.values()),
    )


def batches(found: Survey, protocol: Protocol, batch_size: int) -> Iterator[tuple[list[int], np.ndarray]]:
    """(indices of the prompts, uint8 images (B, S, S, 3)) in order, prepared by the protocol; the last is short."""
    with ThreadPoolExecutor(_THREADS) as pool:
        for first in range(0, len(found), batch_size):
            names = found.names[first : first + batch_size]
            several = pool.map(lambda name: read(found.folder / name, protocol), names)
            yield list(found.indices[first : first + batch_size]), np.stack(list(several))


def read(file: Path, protocol: Protocol) -> np.ndarray:
    """One image as uint8 (S, S, 3): RGB, centre crop to the short side, resized with the protocol's filter."""
    return prepare(images.read_rgb(file, file), protocol)


def prepare(image: Image.Image, protocol: Protocol) -> np.ndarray:
    """uint8 (S, S, 3); see `read`. The crop's corner is rounded as torchvision's `center_crop` does."""
    image = image.convert("RGB")
    if protocol.resize is not None:
        side = min(image.size)
        left, top = (round((length - side) / 2.0) for length in image.size)
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((protocol.size, protocol.size), _FILTERS[protocol.resize])
    return np.asarray(image)


def _examine(file: Path) -> _File:
    try:
        content = file.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            images.check_mode(image, file)
            return _File(image.format or "", image.size, image.mode, hashlib.sha256(content).hexdigest())
    except images.UNREADABLE as error:
        return _File("", (0, 0), "", "", images.reason(error))


def _check_one(folder: Path, what: str, values: dict[str, object]) -> None:
    """Raises `UserError` unless all values are one."""
    counts = Counter(values.values()).most_common()
    if len(counts) == 1:
        return
    usual = counts[0][0]
    odd = [name for name, value in values.items() if value != usual]
    others = ", ".join(_text(value) for value, _ in counts[1 : 1 + _SHOWN])
    raise UserError(
        f"{folder}: images of {len(counts)} {what}: {_text(usual)}, but {_listed(odd)} {others}; one system draws one "
        f"kind, so keep the others elsewhere"
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _text(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
