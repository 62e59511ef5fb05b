"""Labelled images as labelled latents: encoded on the fly, or once into a cache on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from d2g_jax.errors import UserError
from d2g_jax.lpips_training import cache
from d2g_jax.lpips_training.classify import LabelledLatents
from d2g_jax.lpips_training.encoder import Encoder
from d2g_jax.lpips_training.images import Crop, Images

IMAGES_PER_SHARD = 512

T = TypeVar("T")


def on_the_fly(images: Images, encoder: Encoder, crop: Crop, posterior: str, *, augment: bool) -> LabelledLatents:
    """Reads, crops and encodes each batch when it is asked for.

    With `augment` every step sees another random crop of an image (and, by `posterior`, another sample); without it
    the plain crop.
    """

    def batch(rows: np.ndarray, step: int) -> dict[str, np.ndarray]:
        views = [step + 1 if augment else 0] * len(rows)
        pixels, labels = _read(images, crop, rows, views)
        ids = (step * len(rows) + np.arange(len(rows))) % 2**32
        return {"latents": encoder.encode(pixels, posterior, ids), "labels": labels}

    return LabelledLatents(images.count, len(images.classes), encoder.latent_shape(crop.size), batch)


def cached(
    folder: Path, images: Images | None, encoder: Encoder, crop: Crop, posterior: str, *, views: int, label: str
) -> LabelledLatents:
    """Latents of `views` crops of every image, float16, made where they are missing; row = image x views + view.

    View 0 is the plain crop, the others are random. Without images the cache has to be whole.

    Raises `UserError` for a cache of another VAE, of other images or of other crops.
    """
    described = {**encoder.described(), "size": crop.size}
    if images is None:
        cache.check(folder, described)
        shards, classes = cache.open_shards(folder), cache.read_made_from(folder)["classes"]
    else:
        classes = list(images.classes)
        described |= {
            "resize": crop.resize,
            "seed": crop.seed,
            "posterior": posterior,
            "views": views,
            "images_sha256": images.sha256,
            "classes": classes,
        }
        shape = encoder.latent_shape(crop.size)
        record = np.dtype([("latents", "<f2", shape), ("label", "<i4")])

        def make(rows: range) -> np.ndarray:
            made = np.empty(len(rows), record)
            numbers, chosen = np.divmod(np.asarray(rows), views)
            pixels, made["label"] = _read(images, crop, numbers, chosen.tolist())
            latents = encoder.encode(pixels, posterior, np.asarray(rows))
            if not np.abs(latents).max() <= np.finfo(np.float16).max:
                raise UserError(f"{folder}: latents are not finite in float16; check the VAE and its scaling_factor")
            made["latents"] = latents
            return made

        count = images.count * views
        shards = cache.build(folder, described, count, IMAGES_PER_SHARD, make, label=label)

    def batch(rows: np.ndarray, step: int) -> dict[str, np.ndarray]:
        taken = shards.take(rows)
        return {"latents": taken["latents"].astype(np.float32), "labels": taken["label"]}

    return LabelledLatents(len(shards), len(classes), encoder.latent_shape(crop.size), batch)


def in_threads(function: Callable[[Any], T], items: Iterable[Any]) -> list[T]:
    """`function` of every item, in order; decoding and resizing of images leave Python's lock."""
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))


def _read(images: Images, crop: Crop, rows: np.ndarray, views: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 (B, size, size, 3) and labels (B,) of the given views; view 0 is the plain crop."""

    def read(item: tuple[int, int]) -> tuple[np.ndarray, int]:
        row, view = item
        image, label = images.read(row)
        name = images.name(row)
        return (crop.random(image, name, row, view) if view else crop.plain(image, name)), label

    pixels, labels = zip(*in_threads(read, zip(rows.tolist(), views, strict=True)), strict=True)
    return np.stack(pixels), np.asarray(labels, np.int32)
