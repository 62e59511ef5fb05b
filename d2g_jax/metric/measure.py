"""The `d2g metric` job: distances between files, by a latent metric or by pixel LPIPS.

A sample's value depends on the metric's weights, its two files and, with augmentation, on (seed, its index): not on how
many samples are measured beside it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from d2g_jax.inputs import images, numbers
from d2g_jax.inputs.arrays import check_floats, read_array
from d2g_jax.inputs.text import read_json
from d2g_jax.losses import augment
from d2g_jax.losses.lpips import KIND, LPIPS
from d2g_jax.losses.perceptual import LatentLPIPS, check_latents, e_latent_lpips
from d2g_jax.lpips_training.classify import batches
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.progress import Progress

LATENTS = ".npy"

_KINDS = {"latents": f"a {LATENTS} file of latents", "image": "an image", "folder": "a folder"}
_LOCATIONS = 2**16  # pixels or latent pixels that one call measures: below a gigabyte of features at full width
_BATCH = 64


def measure(
    weights: str | Path,
    a: str | Path,
    b: str | Path,
    *,
    draws: int = 0,
    seed: int = 0,
    preset: str = "bgo",
    scaled: bool = True,
) -> dict[str, Any]:
    """Distances between `a` and `b` as a dict for JSON.

    Args:
      weights: a metric folder, of `LatentLPIPS` or of `LPIPS`.
      a, b: for a latent metric two .npy files (N, C, h, w) of one shape; for LPIPS two images of one size, or two
        folders whose images bear the same names.
      draws: 0 measures without augmentation; K averages E-LatentLPIPS over K draws. Latent metrics only.
      seed: of the draws.
      preset: of the draws, one of `augment.PRESETS`.
      scaled: whether latents have been through their VAE's scaling.

    Returns:
      `metric` (lpips, latent_lpips, e_latent_lpips), `space`, `mean`, `distances` (one for each sample, in order),
      `names` (of images; None for latents), `draws`, `preset` and `seed` (None without draws), `scaled` (None for
      images), `weights` and `weights_sha256`.

    Raises:
      UserError: one line, for whatever is wrong with the metric, with the files, or with what is asked of them.
    """
    weights, a, b = Path(weights), Path(a), Path(b)
    _check_draws(draws, seed, preset)
    kind = _kind_of_both(a, b)
    metric = load_metric(weights)
    pixels = isinstance(metric, LPIPS)
    _check_request(weights, a, kind, pixels=pixels, draws=draws, scaled=scaled)
    if pixels:
        names = _image_names(a, b)
        distances = _measure_images(metric, a, b, names)
    else:
        names, distances = None, _measure_latents(metric, a, b, draws=draws, seed=seed, preset=preset, scaled=scaled)
    for i, value in enumerate(distances):
        if not np.isfinite(value):
            where = f"{a}: sample {names[i] if names else i}"
            raise UserError(f"{where} has the distance {value}; its values are too large for float32")
    return {
        "metric": "lpips" if pixels else "e_latent_lpips" if draws else "latent_lpips",
        "space": "pixels" if pixels else metric.space.name,
        "mean": float(np.mean(distances)),
        "distances": distances,
        "names": names,
        "draws": draws,
        "preset": preset if draws else None,
        "seed": seed if draws else None,
        "scaled": None if pixels else scaled,
        "weights": str(weights),
        "weights_sha256": _sha256(weights / "metric.safetensors"),
    }


def load_metric(folder: str | Path) -> LatentLPIPS | LPIPS:
    """The metric of a folder, of the kind that its config.json says. Raises `UserError` as their `load` do."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no metric folder; give one with config.json and metric.safetensors")
    pixels = read_json(folder / "config.json", "a metric folder holds one").get("metric") == KIND
    return LPIPS.load(folder) if pixels else LatentLPIPS.load(folder)


def _check_draws(draws: int, seed: int, preset: str) -> None:
    augment.check_preset(preset)
    numbers.AMOUNT.check("draws", draws)
    numbers.SEED.check("seed", seed)


def _kind_of_both(a: Path, b: Path) -> str:
    """One of `_KINDS`; raises `UserError` unless both are of it."""
    kind, other = _kind(a), _kind(b)
    if kind != other:
        raise UserError(f"{a} is {_KINDS[kind]} and {b} is {_KINDS[other]}; give two of a kind")
    return kind


def _kind(path: Path) -> str:
    if path.is_dir():
        return "folder"
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.suffix.lower() in (LATENTS, *images.SUFFIXES):
        return "latents" if path.suffix.lower() == LATENTS else "image"
    raise UserError(
        f"{path}: neither latents ({LATENTS}) nor an image ({', '.join(images.SUFFIXES)}) nor a folder of images"
    )


def _check_request(weights: Path, a: Path, kind: str, *, pixels: bool, draws: int, scaled: bool) -> None:
    """Raises `UserError` where metric and files, or metric and flags, do not go together."""
    if pixels and kind == "latents":
        raise UserError(f"{a}: latents, but {weights} measures images; give two images, or a latent metric")
    if not pixels and kind != "latents":
        raise UserError(f"{a}: not latents, which {weights} measures; give two {LATENTS} files, or a pixel metric")
    if pixels and draws:
        raise UserError(f"draws={draws}: only latents are augmented, and {weights} measures images; leave it out")
    if pixels and not scaled:
        raise UserError(f"scaled=False, raw latents: {weights} measures images, which have no scaling; leave it out")


def _measure_latents(
    metric: LatentLPIPS, a: Path, b: Path, *, draws: int, seed: int, preset: str, scaled: bool
) -> list[float]:
    """Means over draws, each of which is a call of its own: many of them show how far they are."""
    both = [_read_latents(metric, file, scaled) for file in (a, b)]
    shapes = [(len(x), x.shape[3], *x.shape[1:3]) for x in both]
    if shapes[0] != shapes[1]:
        raise UserError(f"{a} has shape {shapes[0]} and {b} has {shapes[1]}; give latents of one shape")
    count, _, height, width = shapes[0]
    keys = jax.random.split(jax.random.key(seed), draws) if draws else None
    calls, unit = max(1, draws), "draw" if draws > 1 else "sample"
    total = np.zeros(count)
    with Progress("distances", count * calls, unit, beginning="compiling") as progress:
        for rows in batches(count, max(1, min(count, _BATCH, _LOCATIONS // (height * width)))):
            kept = np.unique(rows)  # the last batch repeats its last row
            sides = [jax.device_put(x[rows]) for x in both]
            for draw in range(calls):
                values = _latent_distances(metric, keys, draw, rows, *sides, preset=preset, scaled=scaled)
                total[kept] += np.asarray(values, np.float64)[: len(kept)]
                progress.advance(len(kept))
    return (total / calls).tolist()


def _measure_images(metric: LPIPS, a: Path, b: Path, names: list[str]) -> list[float]:
    """One pair a call, and a program for each size of images."""
    with Progress("distances", len(names), "sample", beginning="compiling") as progress:
        return [float(_image_distance(metric, *pair)) for pair in progress.over(_image_pairs(metric, a, b, names))]


def _read_latents(metric: LatentLPIPS, file: Path, scaled: bool) -> np.ndarray:
    """float32 (N, h, w, C); raises `UserError` for what is no such array, and warns when its scale looks wrong."""
    channels, smallest = metric.space.channels, 2 ** sum(metric.network.config.pools)
    form = f"space {metric.space.name} is floating point (N, {channels}, h, w)"
    latents = read_array(file, form)
    check_floats(latents, file, form)
    if latents.ndim != 4 or latents.shape[1] != channels or not len(latents):
        remedy = "; move its last axis to the second place" if latents.shape[-1:] == (channels,) else ""
        raise UserError(f"{file}: shape {latents.shape}; {form}{remedy}")
    if min(latents.shape[2:]) < smallest:
        raise UserError(f"{file}: shape {latents.shape}; this metric needs at least {smallest}x{smallest}")
    with np.errstate(over="ignore"):  # an overflow is the infinity that is looked for next
        latents = latents.astype(np.float32)
    check_latents(metric, latents, scaled=scaled, source=str(file))
    return np.moveaxis(latents, 1, -1)


def _image_names(a: Path, b: Path) -> list[str]:
    """Of two folders the names of their images; of two files that of `a`. Raises `UserError` for unlike folders."""
    if not a.is_dir():
        return [a.name]
    names = [_names_in(folder) for folder in (a, b)]
    for present, wanted, folder in ((names[1], names[0], b), (names[0], names[1], a)):
        if lacking := sorted(wanted - present):
            more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
            raise UserError(f"{folder}: lacks {lacking[0]}{more}, which the other folder has; give equal names")
    return sorted(names[0])


def _names_in(folder: Path) -> set[str]:
    names = {file.name for file in images.image_files(folder.iterdir())}
    if not names:
        raise UserError(f"{folder}: holds no image ({', '.join(images.SUFFIXES)})")
    return names


def _image_pairs(metric: LPIPS, a: Path, b: Path, names: list[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """float32 (H, W, 3) in [-1, 1], read one by one: folders may hold more than memory does."""
    for name in names:
        files = (a / name, b / name) if a.is_dir() else (a, b)
        both = tuple(images.to_floats(np.asarray(images.read_rgb(file, file))) for file in files)
        sizes = [f"{image.shape[1]}x{image.shape[0]}" for image in both]
        if sizes[0] != sizes[1]:
            raise UserError(f"{files[0]} is {sizes[0]} and {files[1]} is {sizes[1]} pixels; give images of one size")
        if min(both[0].shape[:2]) < metric.smallest_side:
            smallest = f"{metric.smallest_side}x{metric.smallest_side}"
            raise UserError(f"{files[0]} is {sizes[0]} pixels; this metric needs at least {smallest}")
        yield both


@functools.partial(jax.jit, static_argnames=("preset", "scaled"))
def _latent_distances(
    metric: LatentLPIPS,
    keys: jax.Array | None,
    draw: jax.Array,
    index: jax.Array,
    a: jax.Array,
    b: jax.Array,
    *,
    preset: str,
    scaled: bool,
) -> jax.Array:
    """(B,) for latents (B, h, w, C): one draw of `perceptual.expected_distance` of all samples at once.

    `keys` of all draws; None for latents that are not augmented.
    """
    if keys is None:
        return metric.distance(a, b, scaled=scaled)
    own = jax.vmap(functools.partial(jax.random.fold_in, keys[draw]))(index)  # as `augment.draw` does for one key
    return e_latent_lpips(metric, own, a, b, preset, scaled=scaled)


@jax.jit
def _image_distance(metric: LPIPS, a: jax.Array, b: jax.Array) -> jax.Array:
    return metric.distance(a[None], b[None])[0]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
