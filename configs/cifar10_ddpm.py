"""Unconditional CIFAR-10 from google/ddpm-cifar10-32 (Apache-2.0): E-LPIPS of images, then the adversary too.

    d2g metric convert vgg16-397923af.pth --heads=vgg.pth --out=metric/lpips
    d2g pairs --config=configs/cifar10_ddpm.py --workdir=runs/cifar10_ddpm       500,000 pairs, 3.1 GB
    d2g train --config=configs/cifar10_ddpm.py --workdir=runs/cifar10_ddpm

Not run here: no weights. Nothing is published for this teacher in one step; it is weaker than EDM's, and by DDIM in 50
steps weaker still. Rate, warm-up, batch and steps are those of configs/cifar10_edm.py; the rest of the optimiser is the
base's, for an adversary. The number of pairs is what DMD had for its unconditional run. docs/cifar10.md.
"""

from ml_collections import ConfigDict

from d2g_jax.config.base_config import base_config

BATCH, STEPS = 392, 300_000


def get_config() -> ConfigDict:
    """One device to eight."""
    c = base_config()
    c.name = "cifar10_ddpm"
    c.pipeline = "google/ddpm-cifar10-32"
    c.pairs.update(count=500_000, guidance_scale=1.0, batch_size=1024, dtype="float32")
    c.loss.update(name="e_lpips", lpips="metric/lpips", size=224)
    c.adversarial.update(start_images=STEPS // 2 * BATCH, warmup_images=5_000 * BATCH)
    for side in (c.optimizer.generator, c.optimizer.discriminator):
        side.update(warmup_images=500 * BATCH, moment_dtype="float32")
    c.optimizer.generator.learning_rate = 5e-5
    c.train.update(
        remat="elementwise",
        images=STEPS * BATCH,
        batch_size=BATCH,
        groups=56,
        log_every=100 * BATCH,
        sample_every=5_000 * BATCH,
        checkpoint_every=5_000 * BATCH,
    )
    return c.lock()
