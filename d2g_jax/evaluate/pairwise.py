"""Perceptual distances between images: diversity of several seeds of a prompt, fidelity of a student to its teacher."""

from __future__ import annotations

import itertools
from pathlib import Path

import jax
import numpy as np

from d2g_jax.evaluate.features import FrozenNetwork, best_device
from d2g_jax.losses.lpips import LPIPS
from d2g_jax.results import metric_weights
from d2g_jax.runtime.errors import UserError


def load(name: str, path: Path, side: int) -> FrozenNetwork:
    """`lpips` (ours, from a metric folder) or `dreamsim` (its package), for images of `side` pixels.

    Raises `UserError` for unfit weights, and for images that are too small for them.
    """
    return _lpips(path, side) if name == "lpips" else _dreamsim(path)


def mean_pairwise(metric: FrozenNetwork, images: np.ndarray) -> float:
    """Mean distance of all pairs among K >= 2 images (K, S, S, 3) of one prompt."""
    first, second = (list(index) for index in zip(*itertools.combinations(range(len(images)), 2), strict=True))
    return float(metric.run(images[first], images[second]).mean())


def _lpips(folder: Path, side: int) -> FrozenNetwork:
    metric = LPIPS.load(folder)
    if side < metric.smallest_side:
        raise UserError(f"{folder}: images of {side} pixels; it needs at least {metric.smallest_side}")
    # One pair at a time: 64 images of 256 pixels would take gigabytes of features.
    one = lambda metric, pair: metric.distance(*pair)[0]  # noqa: E731
    measure = jax.jit(lambda metric, *both: jax.lax.map(lambda pair: one(metric, pair), both))
    unit = lambda images: images.astype(np.float32) / np.float32(127.5) - np.float32(1)  # noqa: E731

    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.asarray(measure(metric, unit(a)[:, None], unit(b)[:, None]), np.float64)

    return FrozenNetwork("lpips", metric_weights.sha256_of(folder), distances)


_DREAMSIM_NEEDS = (
    "ensemble_lora",
    "dino_vitb16_pretrain.pth",
    "clip_vitb16_pretrain.pth.tar",
    "open_clip_vitb16_pretrain.pth.tar",
    "facebookresearch_dino_main",
    "checkpoints",
)
"""What the package leaves in its cache_dir: with all of it neither it nor its torch.hub goes to the network."""


def _dreamsim(folder: Path) -> FrozenNetwork:
    """The "ensemble" of the dreamsim package (arXiv 2306.09344), offline."""
    for part in _DREAMSIM_NEEDS:
        if not (folder / part).exists():
            given = f"{metric_weights.flag('dreamsim')}={folder}"
            raise UserError(f"{given}: lacks {part}; with a network run: {metric_weights.WHERE['dreamsim']}")
    try:
        import torch
        from dreamsim import dreamsim
        from PIL import Image
    except ImportError as error:
        raise UserError(f"DreamSim needs {error.name or error}: pip install dreamsim (docs/evaluate.md)") from error
    device = best_device(torch)
    model, preprocess = dreamsim(pretrained=True, device=str(device), cache_dir=str(folder))

    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        sides = [torch.cat([preprocess(Image.fromarray(image)) for image in side]).to(device) for side in (a, b)]
        with torch.inference_mode():
            return model(*sides).double().cpu().numpy()

    return FrozenNetwork("dreamsim", metric_weights.sha256_of(folder), distances)
