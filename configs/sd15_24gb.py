"""Stable Diffusion 1.5 at 512 px by the whole method on one 24 GB GPU: low-rank updates of one frozen bfloat16 teacher.

    d2g plan  --config=configs/sd15_24gb.py --topology=gpu:1xRTX4090              what fits, before the first step
    d2g pairs --config=configs/sd15_24gb.py --workdir=runs/sd15 --config.pairs.count=300000
    d2g train --config=configs/sd15_24gb.py --workdir=runs/sd15
    d2g export --model=runs/sd15 --to=lora --out=student-lora

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
    c.mesh.fsdp = 1
    c.adversarial.update(start_images=1_280_000, warmup_images=256_000)  # a quarter of the long run's, as its images
    c.train.update(images=5_120_000, remat="none", micro_batch=8, r1_micro_batch=2)
    return c.lock()
