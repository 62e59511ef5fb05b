"""Stable Diffusion 1.5 at 512 px by the whole method on one 24 GB GPU: low-rank updates of one frozen bfloat16 teacher.

    d2g plan  --config=configs/sd15_24gb.py --topology=gpu:1xRTX4090              what fits, before the first step
    d2g pairs --config=configs/sd15_24gb.py --workdir=runs/sd15 --config.pairs.count=300000
    d2g train --config=configs/sd15_24gb.py --workdir=runs/sd15
    d2g export --model=runs/sd15 --to=lora --out=student-lora

Planned by formula, not measured: 10.0 of 22.8 GiB, 6.0 images/s on an RTX 4090 (40% of its peak), so that 5.12 M images
take 236 hours, and 300,000 pairs 101; if a compiler takes 2.4 times the formula's temporaries, 17.1 GiB.
--config.discriminator.backbone=frozen --config.discriminator.lora_rank=0 trains D's heads alone.

Every field and its meaning: d2g_jax/config/base_config.py; what the updates cost and do: docs/lora.md.
"""

from pathlib import Path

from ml_collections import ConfigDict

from d2g_jax.config.configuration import read_config


def get_config() -> ConfigDict:
    """That of configs/sd15.py with low-rank updates of G and D, for one device."""
    c = read_config(Path(__file__).with_name("sd15.py")).unlock()
    c.name = "sd15_24gb"
    c.lora.rank = c.discriminator.lora_rank = 64
    # Of attention alone a one-step student of the embedded world does not learn to draw (docs/lora.md).
    c.lora.targets = ("attention", "feed_forward", "convolutions")
    # Ten times those of whole networks, as is common for LoRAs: B starts at zero. Not tuned.
    c.optimizer.generator.learning_rate = c.optimizer.discriminator.learning_rate = 1e-4
    c.mesh.fsdp = 1
    c.pairs.batch_size = 16
    c.adversarial.update(start_images=1_280_000, warmup_images=256_000)  # a quarter of the long run's, as its images
    c.train.update(images=5_120_000, remat="elementwise", micro_batch=2, r1_micro_batch=1)
    return c.lock()
