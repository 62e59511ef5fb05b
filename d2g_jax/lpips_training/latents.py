"""Labelled images as labelled latents: encoded on the fly, or once into a cache on disk."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from d2g_jax.lpips_training import cache
from d2g_jax.lpips_training.classify import LabelledLatents
from d2g_jax.lpips_training.encoder import Encoder
from d2g_jax.lpips_training.fit import Batch
from d2g_jax.lpips_training.images import Crop, Images
from d2g_jax.runtime.errors import UserError

IMAGES_PER_SHARD = 512

T = TypeVar("T")


def on_the_fly(images: Images, encoder: Encoder, crop: Crop, posterior: str, *, augment: bool) -> LabelledLatents:
    """Reads, crops and encodes each batch when it is asked for.

    With `augment` every step sees another random crop of an image (and, by `posterior`, another sample); without it
    the plain crop.
    """

    def read(rows: np.ndarray, step: int) -> Batch:
        pixels, labels = _read(images, crop, rows, [step + 1 if augment else 0] * len(rows))
        ids = (step * len(rows) + np.arange(len(rows))) % 2**32
        return {"pixels": pixels, "ids": ids, "labels": labels}

    def encode(batch: Batch) -> Batch:
        return {"latents": encoder.encode(batch["pixels"], posterior, batch["ids"]), "labels": batch["labels"]}

    return LabelledLatents(images.count, len(images.classes), encoder.latent_shape(crop.size), read, encode)


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
        shards = cache.open_shards(folder)
    else:
        described |= {
            "resize": crop.resize,
            "seed": crop.seed,
            "posterior": posterior,
            "views": views,
            "images_sha256": images.sha256,
            "classes": list(images.classes),
        }
        make = functools.partial(_records, images, encoder, crop, posterior, views)
        shards = cache.build(folder, described, images.count * views, IMAGES_PER_SHARD, make, label=label)
    classes = cache.read_made_from(folder)["classes"]

    def read(rows: np.ndarray, step: int) -> Batch:
        taken = shards.take(rows)
        return {"latents": taken["latents"].astype(np.float32), "labels": taken["label"]}

    return LabelledLatents(len(shards), len(classes), encoder.latent_shape(crop.size), read)


def _records(images: Images, encoder: Encoder, crop: Crop, posterior: str, views: int, rows: range) -> np.ndarray:
    """A cache's records of `rows`: structured (n,), latents as float16."""
    record = np.dtype([("latents", "<f2", encoder.latent_shape(crop.size)), ("label", "<i4")])
    made = np.empty(len(rows), record)
    numbers, chosen = np.divmod(np.asarray(rows), views)
    pixels, made["label"] = _read(images, crop, numbers, chosen.tolist())
    latents = encoder.encode(pixels, posterior, np.asarray(rows))
    if (largest := np.abs(latents).max()) > np.finfo(np.float16).max:
        raise UserError(
            f"{encoder.source}: latents reach {largest:.3g}, too much for a float16 cache; empty images.cache"
        )
    made["latents"] = latents
    return made


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
