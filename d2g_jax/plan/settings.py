"""The settings of a config that decide memory and traffic."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import ml_collections

MOMENTS = ("optimizer.generator.moment_dtype", "optimizer.discriminator.moment_dtype")
KNOBS = ("mesh.fsdp", "train.remat", "train.micro_batch", "train.r1_micro_batch", *MOMENTS)


def settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The knobs' values by their names in the config."""
    found = {}
    for name in KNOBS:
        value = config
        for part in name.split("."):
            value = value[part]
        found[name] = value
    return found


def with_settings(config: ml_collections.ConfigDict, changes: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A copy of the config with changes such as {"train.remat": "full"}."""
    changed = copy.deepcopy(config)
    with changed.unlocked():
        changed.update_from_flattened_dict(dict(changes))
    return changed
