"""The settings of a config that decide memory and traffic."""

from __future__ import annotations

from typing import Any

import ml_collections

from d2g_jax.runtime.runs import flatten

MOMENTS = ("optimizer.generator.moment_dtype", "optimizer.discriminator.moment_dtype")
KNOBS = ("mesh.fsdp", "train.remat", "train.micro_batch", "train.r1_micro_batch", *MOMENTS)


def settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The knobs' values by their names in the config."""
    flat = flatten(config.to_dict())
    return {name: flat[name] for name in KNOBS}
