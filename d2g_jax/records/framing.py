"""TFRecord framing: little-endian length (8 bytes), masked CRC32C of it (4), data, masked CRC32C of the data (4).

Source: the TFRecord format as TensorFlow documents it (`tensorflow/core/lib/io/record_writer.h`).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import numpy as np

HEADER = 12  # bytes before the data
FOOTER = 4  # bytes after it


class FrameError(ValueError):
    """Bytes that are no TFRecord frame. `offset` is where in the file the frame starts, when that is known."""

    def __init__(self, reason: str, offset: int = 0):
        super().__init__(reason)
        self.offset = offset


def masked_crc(data: bytes) -> int:
    """TFRecord's CRC32C of `data`: rotated right by 15 bits plus a constant, modulo 2**32."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def frame(data: bytes) -> bytes:
    """`data` as one TFRecord frame."""
    length = struct.pack("<Q", len(data))
    return b"".join((length, struct.pack("<I", masked_crc(length)), data, struct.pack("<I", masked_crc(data))))


def unframe(framed: bytes) -> bytes:
    """The data of one whole frame. Raises `FrameError` on a wrong length or checksum."""
    length = _data_length(framed[:HEADER])
    if len(framed) != HEADER + length + FOOTER:
        raise FrameError(f"frame of {len(framed)} bytes where {HEADER + length + FOOTER} are announced")
    data = framed[HEADER:-FOOTER]
    if struct.unpack("<I", framed[-FOOTER:])[0] != masked_crc(data):
        raise FrameError("checksum of the data does not match")
    return data


def scan(path: Path) -> np.ndarray:
    """Where each frame of a file starts, and where the last one ends: int64 (count + 1,).

    Only the headers are read and checked. Raises `FrameError` with the offset of the first frame that is broken or cut.
    """
    offsets = [0]
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        while (start := offsets[-1]) < size:
            file.seek(start)
            try:
                end = start + HEADER + _data_length(file.read(HEADER)) + FOOTER
            except FrameError as error:
                raise FrameError(str(error), start) from None
            if end > size:
                raise FrameError(f"the file ends at byte {size}, the record at byte {end}", start)
            offsets.append(end)
    return np.asarray(offsets, np.int64)


def read_frames(path: Path) -> Iterator[bytes]:
    """The data of every frame of a file in order, lengths and checksums checked.

    Raises `FrameError` with the offset of the first frame that is broken or cut.
    """
    offsets = scan(path)
    with path.open("rb") as file:
        for start, size in zip(offsets[:-1].tolist(), np.diff(offsets).tolist(), strict=True):
            try:
                yield unframe(file.read(size))
            except FrameError as error:
                raise FrameError(str(error), start) from None


def _data_length(header: bytes) -> int:
    if len(header) < HEADER:
        raise FrameError("the file ends inside a record's header")
    length, crc = struct.unpack("<QI", header)
    if crc != masked_crc(header[:8]):
        raise FrameError("checksum of the length does not match")
    return length
