"""The VGG16 trunk by config: over latents (LatentLPIPS, batch norm, three pools left out) or over pixels (LPIPS).

Parameter paths are those of the published metrics (`slice4.24.kernel`, with torchvision's feature index), so a pool
that is left out still takes its number. A metric runs the folded form, convolutions alone; a classifier trains the form
with batch norm, and `fold_batch_norm` leads from this to that.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from d2g_jax.inputs.fields import as_json, check_sizes, read_fields
from d2g_jax.models.layers import Conv
from d2g_jax.models.network import Network, Params
from d2g_jax.runtime.errors import UserError

TAPS = ("slice_end", "pre_pool")
BATCH_NORM_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class VGGConfig:
    """Shape of the trunk; the defaults are the LatentLPIPS of SD 1.x, 2.x and XL.

    Attributes:
      in_channels: channels of a latent, or 3.
      widths, convs, pools: of each slice the channels, the number of convolutions and whether its 2x2 max-pool is kept.
      batch_norm: whether a batch norm follows each convolution.
      tap: "slice_end" takes features after a slice's pool (LatentLPIPS), "pre_pool" before it (LPIPS).
    """

    in_channels: int = 4
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    convs: tuple[int, ...] = (2, 2, 3, 3, 3)
    pools: tuple[bool, ...] = (False, False, False, True, True)
    batch_norm: bool = True
    tap: str = "slice_end"

    @classmethod
    def from_json(cls, config: Mapping[str, Any], *, source: str) -> VGGConfig:
        """From a `config.json`; raises `UserError` that names `source` and the key."""
        known = read_fields(cls, config, source)
        check_sizes(known, source)
        result = cls(**known)
        if result.tap not in TAPS:
            raise UserError(f"{source}: tap is {result.tap!r}; choose one of {', '.join(TAPS)}")
        if not len(result.widths) == len(result.convs) == len(result.pools):
            raise UserError(f"{source}: widths, convs and pools must be lists of one length, one entry for each slice")
        return result

    def to_json(self) -> dict[str, Any]:
        return as_json(self)


PIXELS = VGGConfig(3, pools=(True, True, True, True, False), batch_norm=False, tap="pre_pool")
"""The trunk of LPIPS: VGG16, features before each pool."""


def conv_indices(config: VGGConfig) -> tuple[tuple[int, ...], ...]:
    """torchvision's feature index of every convolution, by slice; a batch norm's is one more."""
    indices, position, step = [], 0, 3 if config.batch_norm else 2
    for count in config.convs:
        indices.append(tuple(position + step * i for i in range(count)))
        position += step * count + 1  # the pool takes a number even where it is left out
    return tuple(indices)


class BatchNorm(nnx.Module):
    """Batch norm over (B, H, W); statistics in float32. Nothing is updated in place: `train` hands statistics back."""

    def __init__(self, channels: int, dtype: Any):
        self.scale, self.bias = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(channels)), nnx.BatchStat(jnp.ones(channels))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        return self._normalise(x, self.mean[...], self.var[...])

    def train(self, x: jax.Array) -> tuple[jax.Array, Params]:
        """The output and this batch's mean and unbiased variance, as PyTorch's running statistics take them."""
        x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean = x32.mean((0, 1, 2))  # (C,)
        var = jnp.square(x32 - mean).mean((0, 1, 2))
        count = x.size // x.shape[-1]
        return self._normalise(x, mean, var), {"mean": mean, "var": var * (count / max(count - 1, 1))}

    def _normalise(self, x: jax.Array, mean: jax.Array, var: jax.Array) -> jax.Array:
        factor = self.scale[...] * jax.lax.rsqrt(var + BATCH_NORM_EPS)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return ((x - mean) * factor + self.bias[...]).astype(self.dtype)


class VGG(nnx.Module):
    """The trunk; `folded` leaves the batch norms out because their effect is in the convolutions."""

    def __init__(self, config: VGGConfig, *, folded: bool, dtype: Any, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")  # torchvision's for VGG
        channels = config.in_channels
        for s, indices in enumerate(conv_indices(config)):
            layers: dict[int, nnx.Module] = {}
            for index in indices:
                layers[index] = Conv(channels, config.widths[s], kernel_init=init, dtype=dtype, rngs=rngs)
                if config.batch_norm and not folded:
                    layers[index + 1] = BatchNorm(config.widths[s], dtype)
                channels = config.widths[s]
            setattr(self, f"slice{s + 1}", nnx.data(layers))

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """(B, H, W, C) -> the tap of each slice, NHWC in the compute dtype; batch norms use running statistics."""
        return self._run(x, lambda norm, x: (norm(x), {}))[0]

    def train_features(self, x: jax.Array) -> tuple[list[jax.Array], Params]:
        """The taps by batch statistics, and these as a tree like `split_statistics`'s second."""
        return self._run(x, lambda norm, x: norm.train(x))

    def _run(self, x: jax.Array, normalise: Any) -> tuple[list[jax.Array], Params]:
        x, taps, statistics = x.astype(self.dtype), [], {}
        for s, indices in enumerate(conv_indices(self.config)):
            layers = getattr(self, f"slice{s + 1}")
            for index in indices:
                x = layers[index](x)
                if index + 1 in layers:
                    x, batch = normalise(layers[index + 1], x)
                    statistics.setdefault(f"slice{s + 1}", {})[str(index + 1)] = batch
                x = jax.nn.relu(x)
            before = x
            if self.config.pools[s]:
                x = max_pool(x)
            taps.append(before if self.config.tap == "pre_pool" else x)
        return taps, statistics


def max_pool(x: jax.Array) -> jax.Array:
    """2x2 maximum with stride 2, odd last rows dropped: (B, H, W, C) -> (B, H // 2, W // 2, C).

    Maxima of slices have a gradient by comparison, which is many times faster on CPUs than XLA's select-and-scatter;
    ties share the gradient (among zeros after a ReLU it is zero anyway). The gradient of `jnp.max` would divide by the
    number of elements that equal the maximum, and compilers may compute those anew with another rounding: none is equal
    then, and the gradient NaN.
    """
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2].reshape(batch, height // 2, 2, width // 2, 2, channels)
    x = jnp.maximum(x[:, :, 0], x[:, :, 1])  # (B, H // 2, W // 2, 2, C)
    return jnp.maximum(x[:, :, :, 0], x[:, :, :, 1])


@functools.cache
def build(config: VGGConfig, dtype: Any = jnp.float32) -> Network:
    """The folded trunk: `apply(params, x (B, H, W, C)) -> list of taps`; parameters are kernels and biases."""
    return Network.build(config, lambda rngs: VGG(config, folded=True, dtype=dtype, rngs=rngs))


@functools.cache
def build_training(config: VGGConfig, dtype: Any = jnp.float32) -> Network:
    """The trunk with its batch norms. `apply` as in `build`; `apply(..., method="train_features")` trains.

    The parameter tree holds the running statistics as leaves `mean` and `var`: `split_statistics` keeps them from the
    optimiser.
    """
    return Network.build(config, lambda rngs: VGG(config, folded=False, dtype=dtype, rngs=rngs))


def split_statistics(tree: Params) -> tuple[Params, Params]:
    """(trainable parameters, running statistics), two nested dicts."""
    leaves = flatten_dict(tree)
    running = {path: leaves.pop(path) for path in list(leaves) if path[-1] in ("mean", "var")}
    return unflatten_dict(leaves), unflatten_dict(running)


def merge_statistics(params: Params, statistics: Params) -> Params:
    """The inverse of `split_statistics`."""
    return unflatten_dict(flatten_dict(params) | flatten_dict(statistics))


def fold_batch_norm(params: Params, statistics: Params) -> Params:
    """The parameters of `build`'s network that computes what `build_training`'s computes with running statistics.

    w' = w g / sqrt(v + eps), b' = (b - m) g / sqrt(v + eps) + beta. A trunk without batch norms comes back unchanged.
    """
    folded: Params = {}
    for name, layers in params.items():
        folded[name] = {}
        for index, layer in layers.items():
            if "kernel" not in layer:
                continue
            following = str(int(index) + 1)
            if "scale" in layers.get(following, {}):
                norm, running = layers[following], statistics[name][following]
                factor = norm["scale"] / (running["var"] + BATCH_NORM_EPS) ** 0.5  # (out,)
                bias = (layer["bias"] - running["mean"]) * factor + norm["bias"]
                layer = {"kernel": layer["kernel"] * factor, "bias": bias}
            folded[name][index] = dict(layer)
    return folded
