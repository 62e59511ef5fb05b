"""The embedded teacher's recipes: AdamW behind a cap on the gradient's norm, with one rate's course or another."""

from __future__ import annotations

from pathlib import Path

import ml_collections
import optax

from d2g_jax.lpips_training.fit import Recipe


def adamw_recipe(steps: int, learning_rate: float, seed: int, *, batch_size: int, weight_decay: float = 0.0) -> Recipe:
    """AdamW behind a cap on the gradient's norm; the rate warms up over 10% of the steps, at most 100."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(100, steps // 10), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=weight_decay))
    return Recipe(optimizer, steps, batch_size, seed)


def long_recipe(config: ml_collections.ConfigDict, folder: Path) -> Recipe:
    """As `adamw_recipe`, kept in `folder`, but for a rate that falls in the last fifth alone, linearly to zero.

    Until then the same training may be made longer: what was done so far does not depend on `config.steps`. A workdir
    is bound to its config, so that a longer one goes on in another, to which `training/` is copied.
    """
    falling = config.steps // 5
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.learning_rate, 100),
            optax.linear_schedule(config.learning_rate, 0.0, falling),
        ],
        [config.steps - falling],
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=config.b2, weight_decay=config.weight_decay)
    )
    return Recipe(optimizer, config.steps, config.batch_size, config.seed, folder, save_every=500)
