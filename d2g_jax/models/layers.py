"""The layers that the UNet, the VAE and the discriminator share: NHWC, float32 parameters, compute in `dtype`.

Attribute names are those of diffusers' state dict. Attention and transformer blocks are in transformer.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from d2g_jax.models.initializers import Initializer, full, torch_uniform
from d2g_jax.models.network import Keys
from d2g_jax.models.platform import platform
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.sharding import by_sample, whole

Padding = int | tuple[tuple[int, int], tuple[int, int]]

REMATS = ("none", "elementwise", "dots", "full")
"""What of a block the backward pass computes again: nothing; what lies between its products (norms, activations); all
but its products with weights, which is attention too; all but its inputs.

With "none" a compiler keeps what differentiation asks for, of a norm of bfloat16 a float32 array above all.
"""


def check_remat(remat: str) -> None:
    """Raises `UserError` unless `remat` is one of `REMATS`."""
    if remat not in REMATS:
        raise UserError(f"train.remat is {remat!r}; choose one of {', '.join(REMATS)}")


def remat_call(remat: str, module: nnx.Module, *args: Any, method: str = "__call__") -> Any:
    """`module.method(*args)`, of whose activations the backward pass keeps what `remat`, one of `REMATS`, says.

    "elementwise" and "dots" are one here: give "elementwise" methods without attention alone.
    """
    check_remat(remat)
    if remat == "none":
        return getattr(module, method)(*args)
    graphdef, state = nnx.split(module)
    policy = None if remat == "full" else _is_product_with_weights
    call = lambda state, *args: getattr(nnx.merge(graphdef, state), method)(*args)  # noqa: E731
    return jax.checkpoint(call, policy=policy)(state, *args)


def _is_product_with_weights(primitive: Any, *args: Any, **params: Any) -> bool:
    """Linear layers, convolutions and the sums of a norm, but not attention's products, the largest results of all."""
    if primitive.name == "conv_general_dilated":
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)


class Linear(nnx.Module):
    """x @ kernel + bias over the last axis: (..., in) -> (..., out)."""

    def __init__(
        self, in_features: int, out_features: int, *, use_bias: bool = True, dtype: Any = jnp.float32, rngs: Keys
    ):
        self.kernel = nnx.Param(torch_uniform(rngs.params(), (in_features, out_features), jnp.float32))
        self.bias = nnx.Param(full((out_features,), 0.0)) if use_bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        y = by_sample(by_sample(x.astype(self.dtype)) @ whole(self.kernel[...], self.dtype))
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: tuple) -> jax.Array:
    """Cross-correlation as XLA's convolution: (B, H, W, I), (kh, kw, I, O) -> (B, H', W', O)."""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def convolve_by_matmul(x: jax.Array, kernel: jax.Array, stride: int, padding: tuple) -> jax.Array:
    """The same cross-correlation as one matrix product over the concatenated shifted inputs (im2col)."""
    kh, kw, _, out = kernel.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = (x.shape[1] - kh) // stride + 1, (x.shape[2] - kw) // stride + 1
    rows, columns = stride * (height - 1) + 1, stride * (width - 1) + 1
    shifted = [x[:, i : i + rows : stride, j : j + columns : stride] for i in range(kh) for j in range(kw)]
    patches = shifted[0] if len(shifted) == 1 else jnp.concatenate(shifted, axis=-1)  # (B, H', W', kh kw I)
    return patches @ kernel.reshape(-1, out)


def prefers_matmul(x_shape: tuple[int, ...], kernel_shape: tuple[int, ...]) -> bool:
    """Whether im2col is the faster formulation: always for 1x1; else on CPU, for small maps of many channels.

    XLA's CPU convolution runs at 50 GFLOP/s at 8x8x1280 on two cores where the product reaches 117; below some 500
    channels, or above 16x16, copying the nine shifted inputs costs more than it saves.
    """
    if kernel_shape[:2] == (1, 1):
        return True
    small_and_wide = x_shape[1] * x_shape[2] <= 256 and kernel_shape[2] >= 512
    return small_and_wide and platform() == "cpu"


class Conv(nnx.Module):
    """2-D cross-correlation with an HWIO kernel: (B, H, W, in) -> (B, H', W', out).

    `padding` is one number for every side, or ((top, bottom), (left, right)).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        padding: Padding = 1,
        kernel_init: Initializer = torch_uniform,
        dtype: Any = jnp.float32,
        rngs: Keys,
    ):
        shape = (kernel_size, kernel_size, in_features, out_features)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(full((out_features,), 0.0))
        self.stride, self.dtype = stride, dtype
        self.padding = ((padding, padding), (padding, padding)) if isinstance(padding, int) else padding

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = whole(self.kernel[...], self.dtype)
        function = convolve_by_matmul if prefers_matmul(x.shape, kernel.shape) else convolve
        y = by_sample(function(by_sample(x.astype(self.dtype)), kernel, self.stride, self.padding))
        return y + self.bias[...].astype(self.dtype)


class GroupNorm(nnx.Module):
    """Normalises (B, H, W, C) over H, W and the channels of each of `groups` groups.

    Reduces over H and W first and over a group's channels after, as a product with a 0/1 matrix (C, groups), so that
    the large array is never reshaped: on CPU three times faster than the five-dimensional form with first and second
    derivatives, and compiled in a quarter of the time.
    """

    def __init__(self, groups: int, channels: int, eps: float = 1e-5, *, dtype: Any = jnp.float32):
        if channels % groups:
            raise UserError(f"norm_num_groups {groups} does not divide {channels} channels; choose a divisor")
        self.scale, self.bias = nnx.Param(full((channels,), 1.0)), nnx.Param(full((channels,), 0.0))
        self.groups, self.eps, self.dtype = groups, eps, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        _, height, width, channels = x.shape
        size = channels // self.groups
        member = np.repeat(np.eye(self.groups, dtype=np.float32), size, axis=0)  # (C, groups)

        def group_mean(x: jax.Array) -> jax.Array:
            means = jnp.dot(x.sum((1, 2)), member / (height * width * size), precision="highest")  # (B, groups)
            return jnp.dot(means, member.T, precision="highest")[:, None, None]  # (B, 1, 1, C)

        x = x.astype(jnp.float32)
        centred = x - group_mean(x)
        normal = centred * (jax.lax.rsqrt(group_mean(jnp.square(centred)) + self.eps) * self.scale[...])
        return (normal + self.bias[...]).astype(self.dtype)


class LayerNorm(nnx.Module):
    """Normalises over the last axis."""

    def __init__(self, features: int, eps: float = 1e-5, *, dtype: Any = jnp.float32):
        self.scale, self.bias = nnx.Param(full((features,), 1.0)), nnx.Param(full((features,), 0.0))
        self.eps, self.dtype = eps, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        return (normal * self.scale[...] + self.bias[...]).astype(self.dtype)


def sinusoidal_embedding(
    timesteps: jax.Array, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0
) -> jax.Array:
    """Float32 (N, dim) of float or integer timesteps (N,): Vaswani et al. 2017 with the frequencies in two halves.

    Sines first, or cosines first with `flip_sin_to_cos` (all SD models); an odd `dim` is padded with one zero.
    """
    half = dim // 2
    frequencies = np.exp(-math.log(10_000) * np.arange(half) / (half - freq_shift)).astype(np.float32)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies  # (N, dim / 2)
    halves = [jnp.cos(angles), jnp.sin(angles)] if flip_sin_to_cos else [jnp.sin(angles), jnp.cos(angles)]
    return jnp.pad(jnp.concatenate(halves, axis=-1), ((0, 0), (0, dim % 2)))


class TimestepEmbedding(nnx.Module):
    """Two linear layers with SiLU between: (B, in) -> (B, out).

    With `cond_proj_dim` a condition (B, cond_proj_dim), if one is given, is projected and added to the input.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        cond_proj_dim: int | None = None,
        *,
        dtype: Any = jnp.float32,
        rngs: Keys,
    ):
        self.linear_1 = Linear(in_features, out_features, dtype=dtype, rngs=rngs)
        projection = None
        if cond_proj_dim is not None:
            projection = Linear(cond_proj_dim, in_features, use_bias=False, dtype=dtype, rngs=rngs)
        self.cond_proj = projection
        self.linear_2 = Linear(out_features, out_features, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        if condition is not None and self.cond_proj is not None:
            x = x + self.cond_proj(condition)
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class ResnetBlock2D(nnx.Module):
    """GroupNorm-SiLU-conv twice with a residual; the time embedding enters between. (B, H, W, in) -> (B, H', W', out).

    `temb_channels=None` builds the VAE's block, which takes no time embedding. With `scale_shift` the embedding scales
    and shifts behind the second norm. `resample` changes the size, behind the first norm and in the residual, which has
    a 1x1 convolution where the width changes, or always with `project`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_channels: int | None = None,
        *,
        groups: int = 32,
        eps: float = 1e-5,
        output_scale_factor: float = 1.0,
        scale_shift: bool = False,
        resample: Callable[[jax.Array], jax.Array] = lambda x: x,
        project: bool = False,
        dtype: Any = jnp.float32,
        rngs: Keys,
    ):
        kw = {"dtype": dtype, "rngs": rngs}
        projected = 2 * out_channels if scale_shift else out_channels
        self.norm1 = GroupNorm(groups, in_channels, eps, dtype=dtype)
        self.conv1 = Conv(in_channels, out_channels, **kw)
        self.time_emb_proj = None if temb_channels is None else Linear(temb_channels, projected, **kw)
        self.norm2 = GroupNorm(groups, out_channels, eps, dtype=dtype)
        self.conv2 = Conv(out_channels, out_channels, **kw)
        same = in_channels == out_channels and not project
        self.conv_shortcut = None if same else Conv(in_channels, out_channels, 1, padding=0, **kw)
        self.output_scale_factor, self.scale_shift, self.resample = output_scale_factor, scale_shift, resample

    def __call__(self, x: jax.Array, temb: jax.Array | None = None, size: tuple[int, int] | None = None) -> jax.Array:
        """`size` is for upsamplers that are no resnets."""
        hidden = self.conv1(self.resample(jax.nn.silu(self.norm1(x))))
        if self.time_emb_proj is None:
            hidden = self.norm2(hidden)
        elif self.scale_shift:
            scale, shift = jnp.split(self.time_emb_proj(jax.nn.silu(temb))[:, None, None], 2, axis=-1)
            hidden = self.norm2(hidden) * (1 + scale) + shift
        else:
            hidden = self.norm2(hidden + self.time_emb_proj(jax.nn.silu(temb))[:, None, None])  # (B, 1, 1, C)
        hidden = self.conv2(jax.nn.silu(hidden))
        x = self.resample(x)
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return (shortcut + hidden) / self.output_scale_factor


class Downsample2D(nnx.Module):
    """3x3 convolution of stride 2. `padding` 1 in the UNet; ((0, 1), (0, 1)) in the VAE."""

    def __init__(self, channels: int, *, padding: Padding = 1, dtype: Any = jnp.float32, rngs: Keys):
        self.conv = Conv(channels, channels, stride=2, padding=padding, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, temb: jax.Array | None = None) -> jax.Array:
        return self.conv(x)  # (B, H / 2, W / 2, C)


class Upsample2D(nnx.Module):
    """Nearest-neighbour doubling and a 3x3 convolution.

    `size` (H', W'), at most one less than double on each side, asks for the size of the skip tensors to come: nearest
    interpolation to 2n - 1 is that to 2n without the last row.
    """

    def __init__(self, channels: int, *, dtype: Any = jnp.float32, rngs: Keys):
        self.conv = Conv(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, temb: jax.Array | None = None, size: tuple[int, int] | None = None) -> jax.Array:
        batch, height, width, channels = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
        x = x.reshape(batch, 2 * height, 2 * width, channels)
        return self.conv(x if size is None else x[:, : size[0], : size[1]])
