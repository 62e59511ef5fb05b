"""One small supervised training loop for the parts of the digits teacher: autoencoder, denoiser, metric, classifier."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from d2g_jax import mesh as meshes
from d2g_jax import noise

Loss = Callable[[Any, dict[str, jax.Array], jax.Array], jax.Array]
"""(parameters, batch, key) -> scalar."""


def fit(
    loss: Loss,
    params: Any,
    batch_at: Callable[[int], dict[str, np.ndarray]],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    label: str,
    weight_decay: float = 0.0,
    project: Callable[[Any], Any] = lambda params: params,
    ema: float = 0.0,
) -> Any:
    """AdamW with a short warm-up and a cosine decay to zero, data-parallel over all devices.

    Args:
      loss: pure; its key is a function of (seed, label, step).
      params: float32 tree.
      batch_at: host batch of a step; the leading axis is divisible by the number of devices.
      project: applied after each update (for example to keep weights non-negative).
      ema: decay of a moving average that is returned in place of the last parameters; 0 for none.

    Returns:
      The trained parameters as host arrays.
    """
    mesh = meshes.make_mesh()
    warmup = min(100, steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=weight_decay))
    key = noise.purpose_key(seed, label)

    @jax.jit
    def update(carry: tuple[Any, Any, Any], batch: dict[str, jax.Array], step: jax.Array) -> tuple[Any, jax.Array]:
        params, average, state = carry
        value, gradient = jax.value_and_grad(loss)(params, batch, jax.random.fold_in(key, step))
        updates, state = optimizer.update(gradient, state, params)
        params = project(optax.apply_updates(params, updates))
        # Early on the average follows closely, so that the random start is forgotten.
        decay = jnp.minimum(ema, (1.0 + step) / (10.0 + step))
        average = jax.tree.map(lambda a, p: a + (1.0 - decay) * (p - a), average, params) if ema else average
        return (params, average, state), value

    carry = meshes.place((params, params if ema else {}, optimizer.init(params)), mesh)
    values = []
    with tqdm(total=steps, desc=label, unit="step", disable=not sys.stderr.isatty()) as bar:
        for step in range(steps):
            carry, value = update(carry, meshes.place_batch(batch_at(step), mesh), step)
            values.append(float(value))  # waits: simulated devices abort when the host runs ahead
            bar.update()
            if (step + 1) % max(1, steps // 10) == 0:
                bar.write(f"{label}: step {step + 1}/{steps}, loss {np.mean(values[-100:]):.5f}", file=sys.stderr)
    return jax.device_get(carry[1] if ema else carry[0])


def sampled_rows(count: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Row numbers of one step's batch, drawn with replacement; a pure function of (seed, step)."""
    return np.random.default_rng([seed, step]).integers(count, size=batch_size)
