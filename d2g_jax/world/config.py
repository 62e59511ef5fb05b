"""Training of the embedded world's teacher, stage by stage."""

from __future__ import annotations

from ml_collections import ConfigDict


def teacher() -> ConfigDict:
    """Three hours of two CPU cores, most of them the denoiser's."""
    return ConfigDict(
        {
            "scenes": {"count": 30_000, "seed": 1},
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
                    "steps": 2500,
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
