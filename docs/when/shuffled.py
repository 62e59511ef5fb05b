"""`d2g` with students that see their noise through one fixed permutation: the artificial end of docs/when.md.

    python docs/when/shuffled.py ablate perceptual --workdir=runs/when/shuffled --pairs=runs/when/base/pairs/1.0.0 \
        --config.pairs.solver=ddim --config.pairs.steps=25

No convolution can follow a permutation of places and channels, so that most of the map cannot be learned.
"""

from __future__ import annotations

import sys
from typing import Any

import jax
import numpy as np

from d2g_jax.diffusion import schedule

plain = schedule.one_step


def shuffled(denoise: Any, of: schedule.Schedule, timestep: int, noise: jax.Array) -> jax.Array:
    flat = noise.reshape(len(noise), -1)
    order = np.random.RandomState(0).permutation(flat.shape[1])
    return plain(denoise, of, timestep, flat[:, order].reshape(noise.shape))


schedule.one_step = shuffled  # before training and sampling import it from there

from d2g_jax.__main__ import main  # noqa: E402

sys.exit(main([*sys.argv[1:], "--config.name=shuffled"]))  # the workdir is bound to it: no ordinary run goes on in it
