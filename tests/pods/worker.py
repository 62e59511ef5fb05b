"""A process of its own with as many simulated devices as a test wants: `worker.py '{"devices": 8, ...}'`.

Runs G, D and R1 updates of one problem on one mesh, prints what the compiled programs move between devices, and writes
metrics and parameters. Its tests compare files of several such processes.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np

from d2g_jax import mesh as meshes

COLLECTIVE = re.compile(
    r"= (\(?[^=]*?\)?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)


def tiny(size, groups):
    """The problem of test_step.py, with a perceptual loss' augmentation left out."""
    from test_step import problem

    return problem(size, groups)


def digits(size, groups):
    """The demo's networks and settings on made-up pairs."""
    from d2g_jax.digits.config import get_config
    from d2g_jax.pipeline import Pipeline
    from d2g_jax.train.setup import build, initial_state

    config = get_config()
    config.train.update(batch_size=size, groups=groups)
    pipeline = Pipeline.load(config.pipeline)
    d, frozen = build(config, pipeline, SimpleNamespace(text_shapes={}, first_timestep=999, seed=5))
    state = initial_state(config, d, pipeline, meshes.make_mesh(devices=jax.devices()[:1]))
    rng = np.random.default_rng(0)
    height, width, channels = pipeline.latent_shape
    batch = {
        "id": np.arange(size, dtype=np.uint32),
        "input_ids": rng.integers(0, 14, (size, pipeline.token_length)).astype(np.int32),
        "latents": rng.standard_normal((size, channels, height, width)).astype(np.float16),
    }
    return d, frozen, state, batch
