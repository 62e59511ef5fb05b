"""The world's configuration: what the digits' becomes once the demo is on it. `configs/world.py` names it."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from d2g_jax.config.base_config import base_config
from d2g_jax.digits.config import optimizer

WEIGHTS = Path(__file__).parent / "weights"
"""Package data, made by `d2g teacher --config=configs/world.py`: pipeline/, metric/, judge.safetensors, prompts.txt."""


def get_config() -> ConfigDict:
    """Two CPU cores."""
    c = base_config()
    c.name = "world"
    c.pipeline = str(WEIGHTS / "pipeline")
    c.mesh.cpu_devices = 2
    c.optimization_level = "O0"
    c.pairs.update(
        prompts=str(WEIGHTS / "prompts.txt"),
        count=1024,
        records_per_shard=512,
        steps=25,
        guidance_scale=3.0,
        dtype="float32",
    )
    c.loss.update(metric=str(WEIGHTS / "metric"), l1_weight=1.0)
    c.discriminator.head_channels = 32
    c.adversarial.update(start_images=1_536, warmup_images=512)
    c.optimizer = optimizer()
    c.optimizer.generator.learning_rate = 1e-3
    c.train.update(
        images=4_096,
        batch_size=64,
        groups=2,
        dtype="float32",
        ema_half_life_images=512.0,
        held_out=64,
        log_every=512,
        sample_every=2_048,
        checkpoint_every=2_048,
    )
    c.evaluation = ConfigDict(
        {"samples": 1000, "batch_size": 256, "seed": 1, "judge": str(WEIGHTS / "judge.safetensors")}
    )
    c.teacher = teacher()
    return c.lock()


def teacher() -> ConfigDict:
    """Hours of two CPU cores, most of them the denoiser's."""
    return ConfigDict(
        {
            "scenes": {"count": 30_000, "seed": 1},
            "prompts": {"count": 4096, "seed": 2},
            "autoencoder": {
                "steps": 1500,
                "batch_size": 32,
                "learning_rate": 2e-3,
                "b2": 0.999,
                "weight_decay": 0.0,
                "l1_weight": 0.05,
                "kl_weight": 1e-3,
                "seed": 0,
            },
            "judge": {
                "steps": 2500,
                "batch_size": 128,
                "learning_rate": 2e-3,
                "b2": 0.999,
                "weight_decay": 0.01,
                "seed": 0,
            },
            "metric": {
                "trunk": {
                    "steps": 1200,
                    "batch_size": 128,
                    "learning_rate": 2e-3,
                    "b2": 0.999,
                    "weight_decay": 0.01,
                    "seed": 0,
                },
                "heads": {"steps": 1000, "batch_size": 50, "learning_rate": 1e-3, "triplets": 4000, "seed": 0},
            },
            "denoiser": {
                "steps": 18_000,
                "batch_size": 64,
                "learning_rate": 1.5e-3,
                "b2": 0.99,
                "weight_decay": 0.01,
                "caption_dropout": 0.1,
                "caption_variants": 8,
                "ema": 0.999,
                "seed": 0,
            },
        }
    )
