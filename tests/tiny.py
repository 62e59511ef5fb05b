"""A miniature of the embedded teacher with random weights, for tests that need some pipeline and not a good one.

`get_config` is the digits' with that teacher and metrics of one convolution a tap in place of theirs: the same jobs,
compiled and run in a fraction of the time. `CONFIG` is for command lines. No torch is needed.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import json
import os
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from d2g_jax.digits import tokenizer
from d2g_jax.digits.config import get_config as digits_config
from d2g_jax.losses.lpips import save_lpips
from d2g_jax.losses.perceptual import LatentSpace, save_metric
from d2g_jax.models import clip, denoisers, vae, vgg
from d2g_jax.pipeline import folder as pipelines
from d2g_jax.teacher import teacher

CONFIG = f"--config={__file__}"

UNET = dataclasses.replace(
    teacher.UNET,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(8, 16),
    attention_head_dim=2,
    cross_attention_dim=16,
    norm_num_groups=4,
)
LEAST_UNET = denoisers.UNetConfig(
    sample_size=4,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(8, 8),
    layers_per_block=1,
    attention_head_dim=2,
    cross_attention_dim=8,
    norm_num_groups=4,
)
"""One block a level, for tests of steps and of trees, which compile it many times."""
VAE = dataclasses.replace(teacher.VAE, block_out_channels=(8, 8, 8), norm_num_groups=4)
TRUNK = vgg.VGGConfig(in_channels=4, widths=(4, 4, 4, 4, 4), convs=(1,) * 5)
PIXELS = dataclasses.replace(vgg.PIXELS, widths=(4, 4, 4, 4, 4), convs=(1,) * 5)


def get_config() -> ConfigDict:
    """As `d2g_jax.digits.config.get_config`, locked."""
    c = digits_config().unlock()
    root = make(Path(os.environ["D2G_JAX_TINY"]))
    c.pipeline = str(root / "pipeline")
    for section in (c.loss, c.overfit):
        section.update(metric=str(root / "metric"), lpips=str(root / "lpips"))
    c.discriminator.head_channels = 8
    c.optimization_level = "UNKNOWN"  # the flags of conftest.py hold
    return c.lock()


@functools.cache
def make(root: Path) -> Path:
    """`root`, with pipeline/, metric/ and lpips/ in it: by the first of the tests' processes that asks."""
    with (root / "lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        if not (root / "lpips" / "config.json").exists():
            _make(root)
    return root


def _make(root: Path) -> None:
    text = dataclasses.replace(
        teacher.text_config(len(json.loads(tokenizer.tokenizer_files()["vocab.json"]))),
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, projection_dim=16,
    )  # fmt: skip
    networks = {"text_encoder": clip.build(text), "unet": denoisers.build(UNET), "vae": vae.build(VAE)}
    pipelines.save_pipeline(
        root / "pipeline",
        {"text_encoder": text, "unet": UNET, "vae": VAE, "scheduler": teacher.SCHEDULER},
        {name: network.init(jax.random.key(i)) for i, (name, network) in enumerate(networks.items())},
        {"tokenizer": tokenizer.tokenizer_files()},
    )
    heads = [np.ones(width, np.float32) for width in TRUNK.widths]
    space = LatentSpace("digits", TRUNK.in_channels, 1.0)
    save_metric(root / "metric", TRUNK, vgg.build_training(TRUNK).init(jax.random.key(3)), heads, space)
    save_lpips(root / "lpips", vgg.build(PIXELS).init(jax.random.key(4)), heads, PIXELS)
