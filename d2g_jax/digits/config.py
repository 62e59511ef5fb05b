"""The digits configuration: what the demo changes of `base_config`, and its own sections.

d2g demo                                              pairs, three students, figures, report
d2g pairs --workdir=runs/digits                       the pairs alone
d2g train --workdir=runs/digits                       one student alone, on those pairs
"""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from d2g_jax.config.base_config import base_config
from d2g_jax.digits.textures import KINDS

WEIGHTS = Path(__file__).parent / "weights"
"""Package data, made by `d2g teacher`: pipeline/, metric/, lpips/, judge.safetensors, prompts.txt."""

JUDGE = WEIGHTS / "judge.safetensors"
"""Of samples: `d2g_jax.digits.judge`."""


def get_config() -> ConfigDict:
    """Two CPU cores."""
    c = base_config()
    c.name = "digits"
    c.pipeline = str(WEIGHTS / "pipeline")
    c.mesh.cpu_devices = 2
    # Compiling takes a third of the demo. At LLVM's O1 D's step compiles in three quarters of the time of O3 (25.8
    # and 33.7 s of one core of a Xeon, 29 November 2026) and runs as fast; at O0 it runs half as fast.
    c.optimization_level = "O1"
    # As near to the ODE's own solution as 25 steps of DDIM, at 0.6 of their calls: docs/pairs.md
    c.pairs.update(
        prompts=str(WEIGHTS / "prompts.txt"),
        count=1024,
        records_per_shard=512,
        solver="dpmpp_2m",
        steps=15,
        guidance_scale=3.0,
        dtype="float32",
    )
    # In runs so short flips, turns and shifts alone serve better than the paper's transforms: docs/ablations.md
    c.loss.update(metric=str(WEIGHTS / "metric"), lpips=str(WEIGHTS / "lpips"), preset="b", l1_weight=1.0)
    c.discriminator.head_channels = 32
    c.adversarial.update(start_images=1_536, warmup_images=512)
    c.optimizer = optimizer()
    c.train.update(
        images=4_096,
        batch_size=64,
        groups=2,
        dtype="float32",
        packed=True,
        compile_workers=1,  # 2 saved 4 s of the full student's 154 and took 1 GiB more (a Xeon, 29 November 2026)
        ema_half_life_images=512.0,
        held_out=64,
        log_every=512,
        sample_every=2_048,
        checkpoint_every=4_096,  # a signal saves too
    )
    c.overfit.update(metric=str(WEIGHTS / "metric"), lpips=str(WEIGHTS / "lpips"), steps=1000, learning_rate=3e-2)
    c.evaluation = ConfigDict({"samples": 1000, "batch_size": 256, "seed": 1, "judge": str(JUDGE), "grounds": KINDS})
    c.teacher = teacher()
    return c.lock()


def optimizer() -> ConfigDict:
    """Rates ten to a hundred times those of Stable Diffusion, and warm-ups of 16 steps."""
    c = base_config().optimizer
    c.generator.update(
        learning_rate=1e-3,
        betas=(0.9, 0.99),
        weight_decay=0.0,
        warmup_images=1024,
        moment_dtype="float32",
    )
    c.discriminator.update(learning_rate=3e-4, new_learning_rate=1e-3, warmup_images=1024, moment_dtype="float32")
    return c


def teacher() -> ConfigDict:
    """Hours of two CPU cores, most of them the denoiser's."""
    metric_heads = {"steps": 1000, "batch_size": 50, "learning_rate": 1e-3, "triplets": 4000, "seed": 0}
    return ConfigDict(
        {
            "scenes": {"count": 30_000, "plain": 15_000, "seed": 1},
            "prompts": {"count": 4096, "seed": 2},
            "autoencoder": _recipe(2000, 16, 2e-3, weight_decay=0.0, l1_weight=0.05, kl_weight=1e-3),
            "judge": _recipe(2500, 128, 2e-3),
            "metric": {"trunk": _recipe(1200, 128, 2e-3), "heads": dict(metric_heads)},
            "pixel_metric": {"trunk": _recipe(1000, 64, 2e-3), "heads": dict(metric_heads)},
            "text_tower": _recipe(1500, 128, 1e-3, b2=0.99),
            "denoiser": _recipe(
                16_000,
                64,
                1.5e-3,
                b2=0.99,
                time_power=0.6,
                caption_dropout=0.1,
                caption_variants=8,
                ema=0.999,
            ),
        }
    )


def _recipe(
    steps: int, batch_size: int, learning_rate: float, *, b2: float = 0.999, weight_decay: float = 0.01, **others: float
) -> dict[str, float]:
    """Of a network that Adam trains."""
    adam = {"learning_rate": learning_rate, "b2": b2, "weight_decay": weight_decay}
    return {"steps": steps, "batch_size": batch_size, **adam, **others, "seed": 0}
