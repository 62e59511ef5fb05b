"""The encoder of a pipeline folder's VAE: images to scaled latents, batch by batch over all devices."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2g_jax.diffusion import noise
from d2g_jax.losses.perceptual import LatentSpace
from d2g_jax.lpips_training.classify import batches
from d2g_jax.models import vae
from d2g_jax.models.network import Params
from d2g_jax.pipeline.folder import load_vae
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.errors import UserError

POSTERIORS = ("mean", "sample")


@dataclasses.dataclass(frozen=True)
class Encoder:
    """An autoencoder's first half.

    Attributes:
      source: the VAE's folder, for messages.
      config: of the VAE.
      sha256: of the weights that encode. A VAE that shares them (a fine-tuned decoder) has the same latent space.
      batch_size: images per call of the program, a multiple of the devices.
      program: (uint8 (B, H, W, 3), ids uint32 (B,), sample) -> float32 scaled latents (B, h, w, C).
    """

    source: Path
    config: vae.VaeConfig
    sha256: str
    batch_size: int
    program: Callable[[np.ndarray, np.ndarray, bool], jax.Array]

    @classmethod
    def load(cls, pipeline: str | Path, batch_size: int, dtype: jnp.dtype, seed: int) -> Encoder:
        """Of a folder in diffusers' layout, a single file or a hub id; only its VAE is read.

        `seed` is of posterior samples.

        Raises `UserError` for a folder without a VAE and for weights that do not fit its config.
        """
        folder, network, params = load_vae(pipeline, dtype)
        config, mesh = network.config, meshes.make_mesh()
        digest = sha256_of({name: params[name] for name in ("encoder", "quant_conv") if name in params})
        placed = meshes.place(params, mesh)

        @functools.partial(jax.jit, static_argnames="sample")
        def encode(params: Params, batch: dict[str, jax.Array], sample: bool) -> jax.Array:
            images = batch["pixels"].astype(jnp.float32) / 127.5 - 1.0
            mean, logvar = (x.astype(jnp.float32) for x in network.apply(params, images, method="encode"))
            if sample:
                mean += jnp.exp(0.5 * logvar) * noise.record_noise(seed, batch["ids"], mean.shape[1:])
            return vae.scale_latents(config, mean)

        def program(pixels: np.ndarray, ids: np.ndarray, sample: bool) -> jax.Array:
            return encode(placed, meshes.place_batch({"pixels": pixels, "ids": ids}, mesh), sample)

        return cls(folder, config, digest, batch_size, program)

    def space(self, name: str) -> LatentSpace:
        """The latent space of this VAE, called `name`."""
        return LatentSpace(
            name, self.config.latent_channels, self.config.scaling_factor, self.config.shift_factor or 0.0
        )

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """(h, w, C) of the latents of `size` x `size` images."""
        side = size // self.config.downscale
        return side, side, self.config.latent_channels

    def described(self) -> dict[str, Any]:
        """What decides about its latents."""
        return {
            "vae_sha256": self.sha256,
            "scaling_factor": self.config.scaling_factor,
            "shift_factor": self.config.shift_factor or 0.0,
        }

    def encode(self, pixels: np.ndarray, posterior: str, ids: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, 3) -> float32 scaled latents (N, h, w, C).

        Args:
          posterior: "mean", or "sample" with noise that is a function of the seed and of the image's id.
          ids: (N,), from 0 to 2^32 - 1.

        Raises `UserError` for latents that are not finite.
        """
        latents, ids = [], np.asarray(ids, np.uint32)
        for rows in batches(len(pixels), self.batch_size):
            kept = len(np.unique(rows))
            latents.append(jax.device_get(self.program(pixels[rows], ids[rows], posterior == "sample"))[:kept])
        whole = np.concatenate(latents)
        if not np.isfinite(whole).all():
            raise UserError(
                f"{self.source}: its latents hold NaN or infinity; set encoder.dtype=float32 or fix the VAE"
            )
        return whole


def sha256_of(params: Params) -> str:
    """Of the paths, shapes and float32 values of a tree."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(jax.device_get(leaf), dtype="<f4")
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
