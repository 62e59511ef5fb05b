"""Differentiable transforms of latents with explicit keys: the ensemble of E-LatentLPIPS.

The transforms and their strengths are those of the paper's released metric (blit and geometry after StyleGAN2-ADA,
colour and cutout after DiffAugment). Every transform of a preset is applied to every sample. Drawing is apart from
applying, so that both inputs of a metric share one `Transform`, and so that a transform can be written down by hand.

Geometry is one resampling, linear in the latent: reflect-pad by a whole image, upsample by two with the sym6 low-pass
filter, sample bilinearly at an affine grid, downsample by two with the same filter. The separable filters are constant
matrices (padding and upsampling are one matrix), so nothing here has a data-dependent shape. Coordinates, filters and
sums are float32 (or float64 for float64 latents), whatever the latents' dtype.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from d2g_jax.runtime.errors import UserError

PRESETS = ("none", "b", "g", "c", "o", "n", "co", "bg", "bgc", "bgo", "bgco", "bgcn", "bgcon")
"""b: blit, g: geometry, c: colour, o: cutout, n: noise. `bgo` is the set of the paper's main text, `bg` the release's
default."""

# Decomposition low-pass filter of the Symlets-6 wavelet; normalised below to sum one.
_SYM6 = np.array([
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
    0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
    0.0017677118642428036, -0.007800708325034148,
])  # fmt: skip
_TAPS = _SYM6 / _SYM6.sum()
_MARGIN = len(_TAPS) // 4  # rows beyond the image that the last low-pass filter looks at, in source pixels


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transform:
    """One draw per sample; every field is (B,) or (B, 2) float32, or None where the preset leaves it out.

    Attributes:
      flip: 0 or 1, mirrors x.
      quarter_turns: 0, 1, 2 or 3.
      integer_shift: (x, y) in widths and heights, rounded to whole pixels when applied.
      scale: isotropic factor.
      pre_rotation: radians, before the stretch.
      stretch: s; x is scaled by s and y by 1/s.
      post_rotation: radians, after the stretch.
      fractional_shift: (x, y) in widths and heights.
      brightness: added to every channel.
      contrast: factor of the deviation from the sample's own mean.
      saturation: factor of the deviation from the mean over channels at each location.
      noise_scale: standard deviation of the noise.
      noise_key: typed keys (B,).
      cutout_center: (x, y) in widths and heights of a box of half the width and half the height.
    """

    flip: jax.Array | None = None
    quarter_turns: jax.Array | None = None
    integer_shift: jax.Array | None = None
    scale: jax.Array | None = None
    pre_rotation: jax.Array | None = None
    stretch: jax.Array | None = None
    post_rotation: jax.Array | None = None
    fractional_shift: jax.Array | None = None
    brightness: jax.Array | None = None
    contrast: jax.Array | None = None
    saturation: jax.Array | None = None
    noise_scale: jax.Array | None = None
    noise_key: jax.Array | None = None
    cutout_center: jax.Array | None = None


def check_preset(preset: str) -> None:
    """Raises `UserError` unless `preset` is one of `PRESETS`."""
    if preset not in PRESETS:
        raise UserError(f"augmentation preset {preset!r} is unknown; choose one of {', '.join(PRESETS)}")


def draw(key: jax.Array, preset: str, n: int) -> Transform:
    """Draws `n` transforms; sample i depends on (key, i) alone, not on `n`.

    Args:
      key: one typed key, or one per sample (n,) when samples carry keys of their own.
      preset: one of `PRESETS`.

    Raises:
      UserError: for an unknown preset.
    """
    check_preset(preset)
    keys = key if key.ndim else jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n))  # (B,)
    return jax.vmap(functools.partial(_draw_one, preset="" if preset == "none" else preset))(keys)


def _draw_one(key: jax.Array, preset: str) -> Transform:
    # One call for all numbers, whichever the preset uses: threefry is slow to compile on CPUs, and a family's draws
    # stay the same when another family joins.
    u = jax.random.uniform(key, (16,))
    fields: dict[str, jax.Array] = {}
    if "b" in preset:
        fields |= {"flip": jnp.floor(2 * u[0]), "quarter_turns": jnp.floor(4 * u[1])}
        fields["integer_shift"] = 0.125 * (2 * u[2:4] - 1)
    if "g" in preset:
        fields |= {"scale": 2 ** (0.2 * _normal(u[4])), "stretch": 2 ** (0.2 * _normal(u[5]))}
        fields |= {"pre_rotation": math.pi * (2 * u[6] - 1), "post_rotation": math.pi * (2 * u[7] - 1)}
        fields["fractional_shift"] = 0.125 * _normal(u[8:10])
    if "c" in preset:
        fields |= {"brightness": u[10] - 0.5, "contrast": u[11] + 0.5, "saturation": 2 * u[12]}
    if "n" in preset:
        fields["noise_scale"] = 0.1 * jnp.abs(_normal(u[13]))
        fields["noise_key"] = key
    if "o" in preset:
        fields["cutout_center"] = u[14:]
    return Transform(**fields)


def _normal(u: jax.Array) -> jax.Array:
    """Standard normal quantiles of uniforms in [0, 1); the lowest uniform is kept from minus infinity."""
    return math.sqrt(2) * jax.lax.erf_inv(jnp.maximum(2 * u - 1, np.nextafter(np.float32(-1), np.float32(0))))


def apply(transform: Transform, latents: jax.Array, *, stream: int = 0) -> jax.Array:
    """Applies `transform` to scaled latents (B, H, W, C); the same shape and dtype come back.

    Order: geometry, brightness, contrast, saturation, noise, cutout. Gradients flow to the latents alone. `stream`
    numbers the input: two inputs of a metric share everything except additive noise, which is independent. Statistics
    for contrast and saturation are each input's own. A transform without fields returns the latents as they are.
    """
    transform = jax.lax.stop_gradient(transform)
    x = latents.astype(jnp.promote_types(latents.dtype, jnp.float32))
    matrix = inverse_matrix(transform, x.shape[1], x.shape[2], x.dtype)
    if matrix is not None:
        x = resample(matrix, x)
    if transform.brightness is not None:
        x = x + _per_sample(transform.brightness, x.dtype)
    if transform.contrast is not None:
        mean = x.mean((1, 2, 3), keepdims=True)  # (B, 1, 1, 1)
        x = (x - mean) * _per_sample(transform.contrast, x.dtype) + mean
    if transform.saturation is not None:
        mean = x.mean(3, keepdims=True)  # (B, H, W, 1)
        x = (x - mean) * _per_sample(transform.saturation, x.dtype) + mean
    if transform.noise_scale is not None:
        normal = lambda key: jax.random.normal(jax.random.fold_in(key, stream), x.shape[1:], x.dtype)  # noqa: E731
        x = x + _per_sample(transform.noise_scale, x.dtype) * jax.vmap(normal)(transform.noise_key)
    if transform.cutout_center is not None:
        x = jnp.where(_cutout_mask(transform.cutout_center, x.shape[1], x.shape[2]), 0, x)
    return x.astype(latents.dtype)


def _per_sample(values: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return values.astype(dtype)[:, None, None, None]


def _cutout_mask(center: jax.Array, height: int, width: int) -> jax.Array:
    """True inside the box: (B, H, W, 1)."""
    x = jnp.abs((jnp.arange(width) + 0.5) / width - center[:, :1]) < 0.25  # (B, W)
    y = jnp.abs((jnp.arange(height) + 0.5) / height - center[:, 1:]) < 0.25  # (B, H)
    return (y[:, :, None] & x[:, None, :])[..., None]


def inverse_matrix(transform: Transform, height: int, width: int, dtype: jnp.dtype = jnp.float32) -> jax.Array | None:
    """The map from output to input pixels about the image centre, (B, 3, 3); None when there is no geometry.

    Inverses multiply from the left in the order in which the transforms are listed.
    """
    get = lambda name: None if getattr(transform, name) is None else getattr(transform, name).astype(dtype)  # noqa: E731
    size = jnp.array([width, height], dtype)
    factors = []
    if (flip := get("flip")) is not None:
        factors.append(_scaling(1 - 2 * flip, jnp.ones_like(flip)))
    if (turns := get("quarter_turns")) is not None:
        factors.append(_rotation(turns * (math.pi / 2)))
    if (shift := get("integer_shift")) is not None:
        factors.append(_translation(-jnp.round(shift * size)))
    if (scale := get("scale")) is not None:
        factors.append(_scaling(1 / scale, 1 / scale))
    if (angle := get("pre_rotation")) is not None:
        factors.append(_rotation(angle))
    if (stretch := get("stretch")) is not None:
        factors.append(_scaling(1 / stretch, stretch))
    if (angle := get("post_rotation")) is not None:
        factors.append(_rotation(angle))
    if (shift := get("fractional_shift")) is not None:
        factors.append(_translation(-shift * size))
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    return functools.reduce(product, factors) if factors else None


def _matrices(a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array, e: jax.Array, f: jax.Array) -> jax.Array:
    """[[a, b, c], [d, e, f], [0, 0, 1]] for each sample."""
    zero, one = jnp.zeros_like(a), jnp.ones_like(a)
    return jnp.stack([a, b, c, d, e, f, zero, zero, one], -1).reshape(-1, 3, 3)


def _scaling(x: jax.Array, y: jax.Array) -> jax.Array:
    zero = jnp.zeros_like(x)
    return _matrices(x, zero, zero, zero, y, zero)


def _rotation(angle: jax.Array) -> jax.Array:
    cos, sin, zero = jnp.cos(angle), jnp.sin(angle), jnp.zeros_like(angle)
    return _matrices(cos, -sin, zero, sin, cos, zero)


def _translation(shift: jax.Array) -> jax.Array:
    one, zero = jnp.ones_like(shift[:, 0]), jnp.zeros_like(shift[:, 0])
    return _matrices(one, zero, shift[:, 0], zero, one, shift[:, 1])


@functools.lru_cache(maxsize=64)
def _upsampling(size: int) -> np.ndarray:
    """Reflect padding by size - 1 on both sides, then the 2x low-pass upsampling, as (2 (3 size - 2), size).

    The upsampling inserts zeros, pads 6 before and 5 after, and convolves with gain 2.
    """
    padded = 3 * size - 2
    source = np.abs(np.arange(padded) - (size - 1))
    source = np.where(source < size, source, 2 * (size - 1) - source)
    matrix = np.zeros((2 * padded, size))
    for row in range(2 * padded):
        for tap in range(len(_TAPS)):
            column = row + tap - len(_TAPS) // 2
            if 0 <= column < 2 * padded and column % 2 == 0:
                matrix[row, source[column // 2]] += 2 * _TAPS[-1 - tap]
    return matrix


@functools.lru_cache(maxsize=64)
def _downsampling(size: int) -> np.ndarray:
    """The low-pass filter at every second sample, one sample cropped on each side: (size, 2 (size + 6))."""
    matrix = np.zeros((size, 2 * (size + 2 * _MARGIN)))
    for row in range(size):
        matrix[row, 2 * row + 1 : 2 * row + 1 + len(_TAPS)] = _TAPS
    return matrix


def resample(matrix: jax.Array, images: jax.Array) -> jax.Array:
    """Draws `images` (B, H, W, C) through `matrix` (B, 3, 3), the output-to-input map in pixels about the centre.

    Everything beyond one reflection of the image is zero. Four gathers of pixel rows measured fastest at every size
    from 8x8 to 64x64, forward and backward, against per-sample weight matrices (1.3 to 15 times slower on a CPU).
    """
    height, width = images.shape[1:3]
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    constant = lambda array: jnp.asarray(array, images.dtype)  # noqa: E731
    x = product("yi,bijc->byjc", constant(_upsampling(height)), images)
    x = product("xj,byjc->byxc", constant(_upsampling(width)), x)
    x = _bilinear(x, *_grid(matrix, height, width))  # (B, 2 (H + 6), 2 (W + 6), C)
    x = product("vx,byxc->byvc", constant(_downsampling(width)), x)
    return product("uy,byxc->buxc", constant(_downsampling(height)), x)


def _grid(matrix: jax.Array, height: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Coordinates (y, x) in the padded, upsampled image, where pixel i has its centre at i: (B, 2(H+6), 2(W+6))."""
    half = lambda size: size + 2 * _MARGIN  # noqa: E731
    # Shifts count double at twice the resolution. The upsampled image lies half a pixel to the left of its centre, on
    # both sides of the map: that, and pixel centres, is where the whole pixel comes from.
    x = jnp.arange(2 * half(width), dtype=matrix.dtype) + 1 - half(width)
    y = (jnp.arange(2 * half(height), dtype=matrix.dtype) + 1 - half(height))[:, None]
    m = matrix[:, :, :, None, None]
    source_x = m[:, 0, 0] * x + m[:, 0, 1] * y + 2 * m[:, 0, 2]
    source_y = m[:, 1, 0] * x + m[:, 1, 1] * y + 2 * m[:, 1, 2]
    return source_y + (3 * height - 3), source_x + (3 * width - 3)


def _bilinear(images: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """Bilinear samples of `images` (B, H, W, C) at (y, x), zero outside: (*y.shape, C)."""
    batch, height, width, channels = images.shape
    # A border of zeros, two wide at the end, keeps all four neighbours of a clipped coordinate inside the array.
    flat = jnp.pad(images, ((0, 0), (1, 2), (1, 2), (0, 0))).reshape(batch, -1, channels)
    y, x = jnp.clip(y, -1, height), jnp.clip(x, -1, width)
    top, left = jnp.floor(y), jnp.floor(x)
    dy, dx = (y - top)[..., None], (x - left)[..., None]
    stride = width + 3
    index = (top.astype(jnp.int32) + 1) * stride + left.astype(jnp.int32) + 1

    def pixels(offset: int) -> jax.Array:
        where = (index + offset).reshape(batch, -1, 1)
        taken = jnp.take_along_axis(flat, where, 1, mode="promise_in_bounds")
        return taken.reshape(*index.shape, channels)

    upper = pixels(0) * (1 - dx) + pixels(1) * dx
    lower = pixels(stride) * (1 - dx) + pixels(stride + 1) * dx
    return upper * (1 - dy) + lower * dy
