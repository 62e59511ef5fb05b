"""LatentLPIPS and E-LatentLPIPS as frozen pure functions, and the regression losses that a student may train with.

The metric's parameters live in a frozen `LatentLPIPS` of their own and no gradient reaches them, so its heads cannot go
negative by training (the known defect of the released code). Every loss returns one value per sample, which depends on
no other sample of the batch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2g_jax.inputs.fields import read_fields
from d2g_jax.inputs.numbers import RATE
from d2g_jax.inputs.text import read_json
from d2g_jax.losses import augment
from d2g_jax.models import vgg
from d2g_jax.models.network import Network, Params
from d2g_jax.pipeline.weights import load_params, save_state_dict, to_state_dict
from d2g_jax.runtime.atomic import write_json
from d2g_jax.runtime.errors import UserError

UNIT_EPS = 1e-8  # inside the root, in float32: it would underflow in half precision

RegressionLoss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(key, generated (B, h, w, C), target (B, h, w, C)), both scaled latents -> (B,) float32."""

REGRESSION_LOSSES = ("mse", "pseudo_huber", "lpips", "e_lpips", "latent_lpips", "e_latent_lpips")


@dataclasses.dataclass(frozen=True)
class LatentSpace:
    """How a VAE's own latents become the scaled latents that a metric reads: (raw - shift) * scale."""

    name: str
    channels: int
    scale: float
    shift: float = 0.0


LATENT_SPACES = (
    LatentSpace("sd15", 4, 0.18215),
    LatentSpace("sd21", 4, 0.18215),
    LatentSpace("sdxl", 4, 0.13025),
    LatentSpace("sd3", 16, 1.5305, 0.0609),
    LatentSpace("flux", 16, 0.3611, 0.1159),
)


def latent_space(name: str) -> LatentSpace:
    """One of `LATENT_SPACES`; raises `UserError` for another name."""
    for space in LATENT_SPACES:
        if space.name == name:
            return space
    raise UserError(f"latent space {name!r} is unknown; choose one of {', '.join(s.name for s in LATENT_SPACES)}")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params", "heads"], meta_fields=["space", "network"])
@dataclasses.dataclass(frozen=True, eq=False)
class LatentLPIPS:
    """A frozen metric; methods are pure and may be jitted, vmapped and differentiated by their first latents.

    It is a pytree of its arrays: passed as an argument to a jitted function it is no constant of the program.

    Attributes:
      space: the latent space that the metric was trained in.
      network: the folded trunk (`vgg.build`).
      params: its kernels and biases.
      heads: of each tap the non-negative weights (C_k,).
    """

    space: LatentSpace
    network: Network
    params: Params
    heads: tuple[jax.Array, ...]

    @classmethod
    def from_params(
        cls,
        config: vgg.VGGConfig,
        params: Params,
        heads: Sequence[Any],
        space: LatentSpace,
        dtype: Any = jnp.float32,
        source: str = "metric",
    ) -> LatentLPIPS:
        """From a trunk with batch norm (`vgg.build_training`'s whole tree) and the heads' weights; folds it.

        `dtype` is the trunk's compute dtype; feature normalisation and distances are float32 at least. Raises
        `UserError` for heads that are negative, not finite or of the wrong length, and a space with other channels.
        """
        if config.in_channels != space.channels:
            raise UserError(
                f"{source}: in_channels is {config.in_channels} but latent space {space.name} has {space.channels}"
            )
        folded = jax.tree.map(jnp.asarray, vgg.fold_batch_norm(*vgg.split_statistics(params)))
        return cls(space, vgg.build(config, dtype), folded, checked_heads(heads, config, source))

    @classmethod
    def load(cls, folder: str | Path, *, dtype: Any = jnp.float32) -> LatentLPIPS:
        """From a metric folder (`config.json`, `metric.safetensors`).

        Raises `UserError` for a missing or damaged file, and for tensors that are missing, extra, wrongly shaped, NaN,
        or negative where they are heads.
        """
        config, space = read_metric_config(Path(folder, "config.json"))
        file = Path(folder, "metric.safetensors")
        tree = load_params(file, metric_tree(config))
        return cls.from_params(config, tree["net"], heads_of(tree), space, dtype, source=str(file))

    @classmethod
    def abstract(cls, config: vgg.VGGConfig, space: LatentSpace, dtype: Any = jnp.float32) -> LatentLPIPS:
        """The metric's shapes, `jax.ShapeDtypeStruct`s for arrays: what a program is traced with."""
        network = vgg.build(config, dtype)
        heads = tuple(jax.ShapeDtypeStruct((width,), jnp.float32) for width in config.widths)
        return cls(space, network, network.abstract(), heads)

    def channel_differences(self, a: jax.Array, b: jax.Array, *, scaled: bool) -> list[jax.Array]:
        """Of each tap the squared difference of unit features, averaged over locations: (B, C_k) each.

        Everything of the metric but its heads, which are linear in it: what calibration trains on.
        """
        self._check(a, b)
        a, b = (x if scaled else (x - self.space.shift) * self.space.scale for x in (a, b))
        return squared_differences(self.network, self.params, a, b, _inverse_length)

    def distance(self, a: jax.Array, b: jax.Array, *, scaled: bool) -> jax.Array:
        """LatentLPIPS between latents (B, h, w, C): (B,), float32 (float64 for float64), zero for equal inputs.

        Gradients flow to `a` alone. `scaled` says whether the latents have been through the VAE's scaling, as all
        latents in this project's files have. Raises `UserError` for unlike shapes or another channel count.
        """
        return weighted(self.channel_differences(a, b, scaled=scaled), self.heads).sum(-1)

    def _check(self, a: jax.Array, b: jax.Array) -> None:
        if a.shape != b.shape:
            raise UserError(f"latents have shapes {a.shape} and {b.shape}; a distance needs two of one shape")
        if a.ndim != 4 or a.shape[-1] != self.space.channels:
            raise UserError(
                f"latents have shape {a.shape}; latent space {self.space.name} is (B, h, w, {self.space.channels})"
            )
        smallest = 2 ** sum(self.network.config.pools)
        if min(a.shape[1:3]) < smallest:
            raise UserError(f"latents have shape {a.shape}; this metric needs at least {smallest}x{smallest}")


def squared_differences(
    network: Network, params: Params, a: jax.Array, b: jax.Array, inverse_length: Callable[[jax.Array], jax.Array]
) -> list[jax.Array]:
    """Of each tap of a frozen trunk the squared `unit_difference` of two inputs, averaged over locations: (B, C_k).

    Gradients flow to `a` alone.
    """
    # Apart, not concatenated: the target's half then has no backward pass at all.
    # Behind a barrier, because XLA would fold a closed-over trunk's constants, for minutes at full size.
    params = jax.lax.optimization_barrier(jax.lax.stop_gradient(params))
    pairs = zip(network.apply(params, a), network.apply(params, jax.lax.stop_gradient(b)), strict=True)
    return [jnp.square(unit_difference(x, y, inverse_length)).mean((1, 2)) for x, y in pairs]


def weighted(differences: Sequence[jax.Array], heads: Sequence[jax.Array]) -> jax.Array:
    """The terms of a distance by tap, from what each channel differs by: (B, K); no gradient reaches the heads."""
    heads = jax.lax.stop_gradient(heads)
    return jnp.stack([(d * w.astype(d.dtype)).sum(-1) for d, w in zip(differences, heads, strict=True)], axis=-1)


def unit_difference(x: jax.Array, y: jax.Array, inverse_length: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The difference of features (B, h, w, C) after each is brought to unit length over channels.

    `inverse_length` gives a metric's own 1 / length, (B, h, w, C) -> (B, h, w, 1). x r - y s is written as
    ((x - y) (r + s) + (x + y) (r - s)) / 2: compilers contract the short form to a fused multiply-add, whose rounding
    makes equal inputs differ. This one is exactly zero for them and changes sign exactly when they swap.
    """
    x, y = (z.astype(jnp.promote_types(z.dtype, jnp.float32)) for z in (x, y))
    r, s = inverse_length(x), inverse_length(y)
    return ((x - y) * (r + s) + (x + y) * (r - s)) / 2


def _inverse_length(x: jax.Array) -> jax.Array:
    return jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + UNIT_EPS)


def checked_heads(heads: Sequence[Any], config: vgg.VGGConfig, source: str) -> tuple[jax.Array, ...]:
    """Heads as arrays; raises `UserError` for one that is not of its tap's width, finite and non-negative."""
    for i, (head, width) in enumerate(zip(heads, config.widths, strict=True)):
        _check_head(np.asarray(head), width, f"{source}: tensor lin{i}.model.1.weight")
    return tuple(jnp.asarray(head) for head in heads)


def _check_head(head: np.ndarray, width: int, where: str) -> None:
    if head.shape != (width,):
        raise UserError(f"{where} has {head.size} weights; its tap has {width} channels")
    if not np.isfinite(head).all():
        raise UserError(f"{where} holds NaN or infinity; fetch or train the metric again")
    if head.min() < 0:
        raise UserError(f"{where} has negative weights ({head.min():.3g}), so distances could be negative; clamp at 0")


def check_latents(metric: LatentLPIPS, latents: np.ndarray, *, scaled: bool, source: str) -> None:
    """For values at hand (not under jit): raises `UserError` for NaN; warns when the scale looks like the other kind.

    Scaled latents have a standard deviation near 1; a VAE's own are larger or smaller by the factor of its scaling.
    """
    latents = np.asarray(latents, np.float32)
    if not np.isfinite(latents).all():
        raise UserError(f"{source}: holds NaN or infinity; a distance needs finite latents")
    std, factor = float(latents.std()), metric.space.scale
    expected, other = (1.0, 1 / factor) if scaled else (1 / factor, 1.0)
    if std > 0 and abs(math.log(std / other)) < abs(math.log(std / expected)):
        told, meant = ("scaled", "raw") if scaled else ("raw", "scaled")
        warnings.warn(f"{source}: standard deviation {std:.2f} looks {meant}, but was given as {told}", stacklevel=2)


def mean_absolute(a: jax.Array, b: jax.Array) -> jax.Array:
    """Mean absolute difference of each sample: (B, ...) twice -> (B,) float32."""
    dtype = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
    return jnp.abs(a.astype(dtype) - b.astype(dtype)).mean(tuple(range(1, a.ndim)))


def e_latent_lpips(
    metric: LatentLPIPS,
    key: jax.Array,
    a: jax.Array,
    b: jax.Array,
    preset: str = "bgo",
    *,
    scaled: bool,
    l1_weight: float = 0.0,
) -> jax.Array:
    """E-LatentLPIPS with one draw per sample, shared by both inputs: (B,); gradients flow to `a` alone.

    Args:
      key: one typed key for the batch, or one per sample (B,).
      preset: one of `augment.PRESETS`; "none" is plain LatentLPIPS.
      l1_weight: adds that much of the mean absolute difference of the scaled latents, not augmented (the released
        code's default is 1; the paper speaks of none).

    Raises:
      UserError: as `LatentLPIPS.distance`, and for an unknown preset.
    """
    metric._check(a, b)
    a, b = (x if scaled else (x - metric.space.shift) * metric.space.scale for x in (a, b))
    b = jax.lax.stop_gradient(b)
    transform = augment.draw(key, preset, a.shape[0])
    augmented_a, augmented_b = (augment.apply(transform, x, stream=i) for i, x in enumerate((a, b)))
    distance = metric.distance(augmented_a, augmented_b, scaled=True)
    return _with_l1(distance, a, b, l1_weight)


def _with_l1(distance: jax.Array, a: jax.Array, b: jax.Array, weight: float) -> jax.Array:
    return distance + weight * mean_absolute(a, jax.lax.stop_gradient(b)) if weight else distance


def expected_distance(
    metric: LatentLPIPS, key: jax.Array, a: jax.Array, b: jax.Array, preset: str = "bgo", *, draws: int, scaled: bool
) -> jax.Array:
    """The mean of `e_latent_lpips` over `draws` draws, for evaluation: (B,); one key, one value."""
    keys = jax.random.split(key, draws)
    one = lambda key: e_latent_lpips(metric, key, a, b, preset, scaled=scaled)  # noqa: E731
    return jax.lax.map(one, keys).mean(0)


def mse(a: jax.Array, b: jax.Array) -> jax.Array:
    """Mean squared difference of each sample: (B, ...) twice -> (B,) float32."""
    dtype = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
    return jnp.square(a.astype(dtype) - b.astype(dtype)).mean(tuple(range(1, a.ndim)))


def pseudo_huber(a: jax.Array, b: jax.Array, c: float = 0.00054) -> jax.Array:
    """sqrt(|a - b|^2 + k^2) - k with k = c sqrt(d) for d elements a sample: (B, ...) twice -> (B,) float32.

    Song and Dhariwal, "Improved techniques for training consistency models", 2023, equation 8, with their c.
    """
    elements = math.prod(a.shape[1:])
    k = c * math.sqrt(elements)
    return jnp.sqrt(elements * mse(a, b) + k * k) - k


def regression_loss(
    name: str,
    metric: Any = None,
    preset: str = "bgo",
    *,
    l1_weight: float = 0.0,
    pseudo_huber_c: float = 0.00054,
) -> RegressionLoss:
    """The loss called `name`, one of `REGRESSION_LOSSES`; gradients flow to the generated latents alone.

    `metric` and `l1_weight` are for the perceptual losses, `preset` and `pseudo_huber_c` for their own. "lpips" and
    "e_lpips" take an `lpips.DecodedLPIPS`, the other two a `LatentLPIPS`. Raises `UserError` for an unknown name or
    preset, a perceptual loss without a metric and a negative weight.
    """
    if name not in REGRESSION_LOSSES:
        raise UserError(f"regression loss {name!r} is unknown; choose one of {', '.join(REGRESSION_LOSSES)}")
    if l1_weight < 0:
        raise UserError(f"l1_weight is {l1_weight}; give 0 or more")
    if name == "mse":
        return lambda key, generated, target: mse(generated, jax.lax.stop_gradient(target))
    if name == "pseudo_huber":
        return lambda key, generated, target: pseudo_huber(generated, jax.lax.stop_gradient(target), pseudo_huber_c)
    augment.check_preset(preset)
    if metric is None:
        raise UserError(f"regression loss {name!r} needs a metric; give the folder of one")
    if name in ("lpips", "e_lpips"):

        def decoded(key: jax.Array, generated: jax.Array, target: jax.Array) -> jax.Array:
            transform = augment.draw(key, preset, len(generated)) if name == "e_lpips" else None
            return _with_l1(metric.distance(generated, target, transform), generated, target, l1_weight)

        return decoded
    preset = preset if name == "e_latent_lpips" else "none"

    def perceptual(key: jax.Array, generated: jax.Array, target: jax.Array) -> jax.Array:
        return e_latent_lpips(metric, key, generated, target, preset, scaled=True, l1_weight=l1_weight)

    return perceptual


def save_metric(
    folder: str | Path, config: vgg.VGGConfig, params: Params, heads: Sequence[Any], space: LatentSpace
) -> None:
    """Writes a metric folder that `LatentLPIPS.load` reads, with the published tensor names and batch norm unfolded.

    Args:
      params: `vgg.build_training`'s whole tree, running statistics included.
      heads: of each tap the non-negative weights (C_k,).

    Raises:
      UserError: as `LatentLPIPS.from_params`, and when the folder cannot be written.
    """
    LatentLPIPS.from_params(config, params, heads, space, source=str(folder))
    write_folder(Path(folder), params, heads, {**config.to_json(), "latent_space": dataclasses.asdict(space)})


def write_folder(folder: Path, params: Params, heads: Sequence[Any], config: dict[str, Any]) -> None:
    """The two files of a metric's folder, with the published tensor names."""
    lins = {f"lin{i}": {"model": {"1": {"kernel": np.reshape(head, (1, 1, -1, 1))}}} for i, head in enumerate(heads)}
    save_state_dict(to_state_dict({"net": params, **lins}), folder / "metric.safetensors")
    # Last: a folder with a config.json is whole.
    write_json(folder / "config.json", config)


def heads_of(tree: Params) -> list[np.ndarray]:
    """The heads (C_k,) of a tree that is like `metric_tree`."""
    return [tree[f"lin{i}"]["model"]["1"]["kernel"].reshape(-1) for i in range(len(tree) - 1)]


def read_metric_config(file: Path) -> tuple[vgg.VGGConfig, LatentSpace]:
    """The trunk and the space of a metric folder's `config.json`; raises `UserError` when it holds something else."""
    config = read_json(file, "a metric folder holds one")
    try:
        space = LatentSpace(**read_fields(LatentSpace, config.pop("latent_space"), f"{file}: latent_space"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a metric's config with a latent_space ({error}); write it again") from error
    RATE.check(f"{file}: latent_space: scale", space.scale)
    return vgg.VGGConfig.from_json(config, source=str(file)), space


def metric_tree(config: vgg.VGGConfig) -> Params:
    """The tree of a metric file: the trunk with batch norm as `net`, the heads as 1x1 convolutions `lin{k}.model.1`."""
    head = lambda width: {"model": {"1": {"kernel": jax.ShapeDtypeStruct((1, 1, width, 1), jnp.float32)}}}  # noqa: E731
    lins = {f"lin{i}": head(width) for i, width in enumerate(config.widths)}
    return {"net": vgg.build_training(config).abstract(), **lins}
