"""Folders of labelled images: one of class folders, or one that TFDS prepared."""

from __future__ import annotations

import hashlib
from pathlib import Path

from d2g_jax.inputs.images import image_files, read_rgb
from d2g_jax.lpips_training.images import Images
from d2g_jax.lpips_training.tfds_images import open_tfds
from d2g_jax.runtime.errors import UserError


def open_images(folder: str | Path, split: str) -> Images:
    """A folder of class folders, or a TFDS folder (one with `dataset_info.json`), of which `split` is taken.

    Raises `UserError` for what is neither, fewer than two classes and a class without images.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one with a folder of PNG or JPEG images for each class")
    if (folder / "dataset_info.json").is_file():
        return open_tfds(folder, split)
    return open_class_folders(folder)


def open_class_folders(folder: Path) -> Images:
    """Class folders in the order of their names; images at any depth below them."""
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(classes) < 2:
        raise UserError(f"{folder}: holds {len(classes)} class folders; a classifier needs two or more")
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        inside = sorted(image_files((folder / name).rglob("*")))
        if not inside:
            raise UserError(f"{folder / name}: holds no PNG or JPEG image; add some or remove the class folder")
        files += inside
        labels += [label] * len(inside)
    names = "\n".join(str(file.relative_to(folder)) for file in files)
    digest = hashlib.sha256(names.encode()).hexdigest()
    read = lambda i: (read_rgb(files[i], files[i]), labels[i])  # noqa: E731
    return Images(folder, len(files), tuple(classes), read, lambda i: str(files[i]), digest)
