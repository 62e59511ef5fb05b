"""Pixel LPIPS as frozen pure functions: the baseline that LatentLPIPS is measured against.

The metric of Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018, by the rules
of version 0.1 of its `lpips` package: VGG16 without batch norm over images in [-1, 1], features before each pool,
non-negative heads. Where it differs from `LatentLPIPS`: a scaling layer in front, and the epsilon of the unit length
stands outside the root.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from d2g_jax.inputs.text import read_json
from d2g_jax.losses import augment, perceptual
from d2g_jax.models import vae, vgg
from d2g_jax.models.network import Network, Params
from d2g_jax.pipeline.weights import load_params
from d2g_jax.runtime.errors import UserError

SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
"""The scaling layer: (image - SHIFT) / SCALE is ImageNet's normalisation of an image in [-1, 1]."""

UNIT_EPS = 1e-10  # outside the root

KIND = "lpips"
"""What `metric` says in the config.json of a folder of this metric."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params", "heads"], meta_fields=["network"])
@dataclasses.dataclass(frozen=True, eq=False)
class LPIPS:
    """A frozen metric; methods are pure and may be jitted, vmapped and differentiated by their first images.

    It is a pytree of its arrays: passed as an argument to a jitted function it is no constant of the program.

    Attributes:
      network: the trunk (`vgg.build`).
      params: its kernels and biases.
      heads: of each tap the non-negative weights (C_k,).
    """

    network: Network
    params: Params
    heads: tuple[jax.Array, ...]

    @classmethod
    def from_params(
        cls,
        params: Params,
        heads: Sequence[Any],
        config: vgg.VGGConfig = vgg.PIXELS,
        dtype: Any = jnp.float32,
        source: str = "metric",
    ) -> LPIPS:
        """From the tree of `vgg.build(config)` and the heads' weights; `dtype` is the trunk's compute dtype.

        Feature normalisation and distances are float32 at least. Raises `UserError` for heads that are negative, not
        finite or of the wrong length, and for a trunk that is not over three channels or has batch norms.
        """
        _check_config(config, source)
        heads = perceptual.checked_heads(heads, config, source)
        return cls(vgg.build(config, dtype), jax.tree.map(jnp.asarray, params), heads)

    @classmethod
    def load(cls, folder: str | Path, *, dtype: Any = jnp.float32) -> LPIPS:
        """From a folder of `save_lpips`.

        Raises `UserError` for a missing or damaged file, a latent metric's folder, and for tensors that are missing,
        extra, wrongly shaped, NaN, or negative where they are heads.
        """
        source, file = Path(folder, "config.json"), Path(folder, "metric.safetensors")
        config = _read_config(source)
        _check_config(config, str(source))
        tree = load_params(file, perceptual.metric_tree(config))
        return cls.from_params(tree["net"], perceptual.heads_of(tree), config, dtype, source=str(file))

    def channel_differences(self, a: jax.Array, b: jax.Array) -> list[jax.Array]:
        """Everything of the metric but its heads, as of `LatentLPIPS`: (B, C_k) by tap."""
        self._check(a, b)
        both = (_scaling_layer(x) for x in (a, b))
        return perceptual.squared_differences(self.network, self.params, *both, _inverse_length)

    def distance(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """LPIPS between images (B, H, W, 3) in [-1, 1]: (B,), float32 (float64 for float64), zero for equal inputs.

        Gradients flow to `a` alone. Raises `UserError` for unlike shapes, other than three channels, integers, and
        images too small for the trunk's four pools.
        """
        return perceptual.weighted(self.channel_differences(a, b), self.heads).sum(-1)

    def _check(self, a: jax.Array, b: jax.Array) -> None:
        if a.shape != b.shape:
            raise UserError(f"images have shapes {a.shape} and {b.shape}; a distance needs two of one shape")
        if a.ndim != 4 or a.shape[-1] != 3:
            raise UserError(f"images have shape {a.shape}; LPIPS takes (B, H, W, 3)")
        if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (a, b)):
            raise UserError(f"images are {a.dtype} and {b.dtype}; LPIPS takes floating point in [-1, 1]")
        smallest = self.smallest_side
        if min(a.shape[1:3]) < smallest:
            raise UserError(f"images have shape {a.shape}; LPIPS needs at least {smallest}x{smallest}")

    @property
    def smallest_side(self) -> int:
        """Pixels along a side, below which a pool would leave nothing."""
        return 2 ** sum(self.network.config.pools)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["lpips", "decoder"], meta_fields=["network", "size"])
@dataclasses.dataclass(frozen=True, eq=False)
class DecodedLPIPS:
    """Pixel LPIPS as a metric of latents, in one frozen pytree: the baseline that the paper trains against.

    Attributes:
      lpips: the metric of images.
      decoder: the VAE's parameters.
      network: the VAE, or what stands in its place where images are the latents.
      size: pixels along the short side to which smaller images are enlarged, bilinearly, for the trunk; 0 leaves them.
    """

    lpips: LPIPS
    decoder: Params
    network: Network
    size: int = 0

    def decode(self, latents: jax.Array) -> jax.Array:
        """Scaled latents (B, h, w, C) -> images (B, H, W, 3), about [-1, 1]; no gradient reaches the parameters."""
        decoder = jax.lax.stop_gradient(self.decoder)
        return self.network.apply(decoder, vae.unscale_latents(self.network.config, latents), method="decode")

    def distance(self, a: jax.Array, b: jax.Array, transform: augment.Transform | None = None) -> jax.Array:
        """LPIPS of what two scaled latents (B, h, w, C) look like: (B,).

        Gradients flow to `a` alone, through the decoder; the target is decoded and seen without a backward pass. Images
        are not clipped to [-1, 1]: beyond it a clipped one would have no gradient.

        With a `transform` both images go through it first, before they are enlarged: E-LPIPS (Kettunen et al., 2019)
        with one draw a step, by the transforms of E-LatentLPIPS.
        """
        target = jax.lax.stop_gradient(self._seen(jax.lax.stop_gradient(b), transform, 1))
        return self.lpips.distance(self._seen(a, transform, 0), target)

    def _seen(self, latents: jax.Array, transform: augment.Transform | None, stream: int) -> jax.Array:
        images = self.decode(latents)
        if transform is not None:
            images = augment.apply(transform, images, stream=stream)
        short = min(images.shape[1:3])
        if short >= self.size:
            return images
        sides = (round(side * self.size / short) for side in images.shape[1:3])
        return jax.image.resize(images, (images.shape[0], *sides, images.shape[-1]), "bilinear")


def save_lpips(folder: str | Path, params: Params, heads: Sequence[Any], config: vgg.VGGConfig = vgg.PIXELS) -> None:
    """Writes a metric folder that `LPIPS.load` reads, with the `lpips` package's tensor names.

    Args:
      params: the tree of `vgg.build(config)`.
      heads: of each tap the non-negative weights (C_k,).

    Raises:
      UserError: as `LPIPS.from_params`, and when the folder cannot be written.
    """
    LPIPS.from_params(params, heads, config, source=str(folder))
    perceptual.write_folder(Path(folder), params, heads, {"metric": KIND, **config.to_json()})


def _read_config(file: Path) -> vgg.VGGConfig:
    config = read_json(file, "a metric folder holds one")
    kind, space = config.pop("metric", None), config.get("latent_space")
    if kind != KIND:
        found = "that of a latent metric" if space is not None else f"metric is {kind!r}"
        raise UserError(f"{file}: not the config of a pixel metric, {found}; give a folder whose metric is {KIND!r}")
    return vgg.VGGConfig.from_json(config, source=str(file))


def _check_config(config: vgg.VGGConfig, source: str) -> None:
    if config.in_channels != 3 or config.batch_norm:
        raise UserError(f"{source}: LPIPS has in_channels 3 and batch_norm false; this config is another network's")


def _scaling_layer(images: jax.Array) -> jax.Array:
    images = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    return (images - jnp.asarray(SHIFT, images.dtype)) / jnp.asarray(SCALE, images.dtype)


def _inverse_length(x: jax.Array) -> jax.Array:
    """1 / (|x| + eps) over channels, (B, h, w, 1); 0 where x is 0.

    There the root has no gradient, the product with x is 0 whatever this is, and behind a closed ReLU no gradient
    passes anyway.
    """
    squares = jnp.square(x).sum(-1, keepdims=True)
    positive = squares > 0
    length = jnp.sqrt(jnp.where(positive, squares, 1))
    return jnp.where(positive, 1 / (length + UNIT_EPS), 0)
