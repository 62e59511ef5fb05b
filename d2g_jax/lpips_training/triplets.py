"""2AFC triplets in the folder layout of the LPIPS data set (BAPPS).

`train/KIND/{ref,p0,p1}/NNNNNN.png` and `train/KIND/judge/NNNNNN.npy`; `val` likewise. A judgement is a number:
the share of people who found p1 closer to the reference than p0.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from d2g_jax.inputs.arrays import read_array
from d2g_jax.inputs.images import image_files, read_rgb
from d2g_jax.runtime.errors import UserError

SIDES = ("ref", "p0", "p1")
JUDGE = "judge"


@dataclasses.dataclass(frozen=True)
class TripletFolder:
    """One kind of distortion: the files of every triplet, in the order of their names."""

    name: str
    folder: Path
    images: tuple[tuple[Path, Path, Path], ...]  # ref, p0, p1
    judgements: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.judgements)

    @property
    def sha256(self) -> str:
        """Of the files' names."""
        return hashlib.sha256("\n".join(file.stem for file in self.judgements).encode()).hexdigest()

    def patches(self, row: int, size: int) -> np.ndarray:
        """Reference, p0 and p1 of a triplet, upsampled bicubically: uint8 (3, size, size, 3)."""
        return np.stack([_patch(file, size) for file in self.images[row]])

    def judgement(self, row: int) -> float:
        """The share of people who preferred p1; raises `UserError` unless it is one number in [0, 1]."""
        file = self.judgements[row]
        value = read_array(file, "a judgement, as the data set has it")
        if value.size != 1 or value.dtype.kind not in "biuf" or not 0 <= value.item() <= 1:
            raise UserError(f"{file}: a judgement is one number from 0 to 1, this holds {value.tolist()}")
        return float(value.item())


def open_triplets(folder: str | Path, part: str) -> tuple[TripletFolder, ...]:
    """Every kind below `folder`/`part`; `folder` is the data set's `2afc`, `part` its `train` or `val`.

    Raises `UserError` for a missing folder, a kind without judgements, and files that do not go together.
    """
    parent = Path(folder) / part
    if not parent.is_dir():
        raise UserError(f"{parent}: no such folder; triplets.folder is the 2afc folder of the LPIPS data set")
    kinds = sorted(entry for entry in parent.iterdir() if entry.is_dir())
    if not kinds:
        raise UserError(f"{parent}: holds no kinds of distortion; expected folders such as traditional and cnn")
    return tuple(_open_kind(kind) for kind in kinds)


def _open_kind(folder: Path) -> TripletFolder:
    judgements = _files(folder / JUDGE, _judgements, "judgements; calibration needs one for each triplet")
    sides = [_files(folder / side, image_files, "images") for side in SIDES]
    for side, files in zip(SIDES, sides, strict=True):
        if len(files) != len(judgements):
            raise UserError(
                f"{folder}: {len(files)} images in {side} but {len(judgements)} judgements; fetch the data set again"
            )
        if unlike := sorted({file.stem for file in files} ^ {file.stem for file in judgements}):
            raise UserError(f"{folder}: {unlike[0]} is not in both {side} and {JUDGE}; fetch the data set again")
    return TripletFolder(folder.name, folder, tuple(zip(*sides, strict=True)), tuple(judgements))


def _judgements(paths: Iterable[Path]) -> Iterator[Path]:
    return (path for path in paths if path.suffix.lower() == ".npy" and not path.name.startswith("."))


def _files(folder: Path, wanted: Callable[[Iterable[Path]], Iterator[Path]], what: str) -> list[Path]:
    files = sorted(wanted(folder.iterdir() if folder.is_dir() else ()), key=lambda file: file.stem)
    if not files:
        raise UserError(f"{folder}: holds no {what}; expected ref, p0, p1 and judge in every kind's folder")
    return files


def _patch(file: Path, size: int) -> np.ndarray:
    image = read_rgb(file, file)
    if image.width != image.height:
        raise UserError(f"{file}: {image.width}x{image.height} pixels; patches are square")
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
