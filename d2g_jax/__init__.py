"""Diffusion2GAN in JAX: distil a diffusion model into a one-step conditional GAN.

    import d2g_jax

    student = d2g_jax.load("runs/demo/students/full")  # a workdir, an export, a .safetensors file, a hub id
    images = student(["a red seven on navy and white dots", "a thin green three on plain sky"], seed=0)  # PIL images

`load`, `LatentLPIPS` and `e_latent_lpips` are imported, and jax with them, at their first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from d2g_jax.runtime.version import __version__

if TYPE_CHECKING:
    from d2g_jax.losses.perceptual import LatentLPIPS, e_latent_lpips
    from d2g_jax.sample.model import load

__all__ = ["LatentLPIPS", "__version__", "e_latent_lpips", "load"]

_HOME = {
    "LatentLPIPS": "d2g_jax.losses.perceptual",
    "e_latent_lpips": "d2g_jax.losses.perceptual",
    "load": "d2g_jax.sample.model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
