"""What training carries from step to step, the optimisers, and the moving average of the generator."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from d2g_jax.models.network import Params
from d2g_jax.runtime.errors import UserError

UPDATES = ("generator", "discriminator", "r1")
"""The kinds of update, in the order in which an iteration makes them."""

MOMENT_DTYPES = ("float32", "bfloat16")
"""Of Adam's first moments. The second ones stay float32: in bfloat16 a decay of 0.1% a step would round to nothing."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a checkpoint holds. Nothing random is carried: keys come from (seed, purpose, step).

    Attributes:
      step: int32 (), optimiser steps of the generator so far.
      images: int32 (), images seen so far; also the position in the data.
      generator: float32 parameters of the student, or low-rank updates of the teacher, of which it is made.
      ema: their moving average, which is what is sampled, evaluated and exported.
      generator_optimizer: optax state.
      discriminator, discriminator_optimizer: the same for D; empty dicts in a regression-only run.
      left_out: int32 () by kind of update, how many in a row were not applied for not being finite (see guard.py).
    """

    step: jax.Array
    images: jax.Array
    generator: Params
    ema: Params
    generator_optimizer: Any
    discriminator: Any
    discriminator_optimizer: Any
    left_out: dict[str, jax.Array]


def _adam(
    config: ml_collections.ConfigDict,
    learning_rate: float,
    batch_size: int,
    first_beta1: tuple[float, int] | None = None,
) -> optax.GradientTransformation:
    """`first_beta1`: another first beta, and for how many updates."""
    b1, b2 = config.betas
    # The first update already moves: a schedule that starts at exactly zero wastes a step.
    schedule = optax.linear_schedule(0.0, learning_rate, max(1, config.warmup_images // batch_size))
    if config.moment_dtype not in MOMENT_DTYPES:
        raise UserError(
            f"moment_dtype={config.moment_dtype!r} of an optimizer; choose one of {', '.join(MOMENT_DTYPES)}"
        )
    make = functools.partial(
        optax.adamw,
        lambda count: schedule(count + 1),
        b2=b2,
        weight_decay=config.weight_decay,
        mu_dtype=jnp.dtype(config.moment_dtype),
    )
    if first_beta1 is None or first_beta1[0] == b1:
        return make(b1=b1)
    before, updates = first_beta1
    by_phase = optax.inject_hyperparams(make, static_args=("mu_dtype",))
    return by_phase(b1=lambda count: jnp.where(count < updates, before, b1))


def generator_optimizer(
    config: ml_collections.ConfigDict, batch_size: int, regression_images: int = 0
) -> optax.GradientTransformation:
    """AdamW with warm-up and a cap on the global gradient norm, from `config.optimizer.generator`.

    `regression_images`: before G listens to D, for which `regression_beta1` is.

    Raises `UserError` for an unknown `moment_dtype`.
    """
    beta1 = config.regression_beta1
    phase = None if beta1 is None else (beta1, regression_images // batch_size)
    adam = _adam(config, config.learning_rate, batch_size, phase)
    return optax.chain(optax.clip_by_global_norm(config.gradient_clip), adam)


def discriminator_optimizer(config: ml_collections.ConfigDict, batch_size: int) -> optax.GradientTransformation:
    """As the generator's, with its own rate for the layers that the teacher does not have (path not under `unet`)."""

    def labels(params: Params) -> Params:
        return {
            name: jax.tree.map(lambda _, n=name: "teacher" if n == "unet" else "new", params[name]) for name in params
        }

    groups = {
        "teacher": _adam(config, config.learning_rate, batch_size),
        "new": _adam(config, config.new_learning_rate, batch_size),
    }
    return optax.chain(optax.clip_by_global_norm(config.gradient_clip), optax.multi_transform(groups, labels))


def ema_decay(images: jax.Array, batch_size: int, half_life_images: float) -> jax.Array:
    """Decay of one step for a half-life counted in images; the half-life ramps up with 5% of the images seen.

    The ramp keeps the teacher's weights, which are blurry at one step, from lingering in short runs (EDM, arXiv
    2206.00364, appendix F.2).
    """
    half_life = jnp.minimum(half_life_images, 0.05 * images.astype(jnp.float32))
    return 0.5 ** (batch_size / jnp.maximum(half_life, 1e-8))


def update_ema(ema: Params, params: Params, decay: jax.Array) -> Params:
    return jax.tree.map(lambda old, new: old + (1.0 - decay) * (new - old), ema, params)


def create_state(
    generator: Params,
    optimizer: optax.GradientTransformation,
    discriminator: Params | None = None,
    d_optimizer: optax.GradientTransformation | None = None,
) -> TrainState:
    """The state before the first step; the average starts as the generator itself."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        images=jnp.zeros((), jnp.int32),
        generator=generator,
        ema=jax.tree.map(jnp.copy, generator),
        generator_optimizer=optimizer.init(generator),
        discriminator={} if discriminator is None else discriminator,
        discriminator_optimizer={} if discriminator is None else d_optimizer.init(discriminator),
        left_out={update: jnp.zeros((), jnp.int32) for update in UPDATES},
    )
