"""Conditional CIFAR-10 from EDM's teacher, by regression alone: the recipe of DMD's appendix (arXiv 2311.18828).

    d2g teacher convert edm-cifar10-32x32-cond-vp.pt --out=teachers/edm-cifar10-32x32-cond-vp
    d2g metric convert vgg16-397923af.pth --heads=vgg.pth --out=metric/lpips
    d2g pairs --config=configs/cifar10_edm.py --workdir=runs/cifar10_edm         100,000 pairs, 1.2 GB
    d2g plan  --config=configs/cifar10_edm.py --topology=gpu:1xH100
    d2g train --config=configs/cifar10_edm.py --workdir=runs/cifar10_edm
    d2g evaluate --config=configs/evaluate/cifar10.py --out=runs/cifar10_edm/fid.json

Published for this recipe: FID 3.82 by regression alone (2.66 for all of DMD, 1.84 for the teacher, 9.36 for Luhman's
squared error). Not run here: no weights. The teacher's weights are CC BY-NC-SA. Hours: docs/cifar10.md.

E-LPIPS in place of LPIPS: --config.loss.name=e_lpips. Every field and its meaning: d2g_jax/config/base_config.py.
"""

from ml_collections import ConfigDict

from d2g_jax.config.base_config import base_config

BATCH, STEPS = 392, 300_000


def get_config() -> ConfigDict:
    """One device to eight, or seven as DMD had."""
    c = base_config()
    c.name = "cifar10_edm"
    c.pipeline = "teachers/edm-cifar10-32x32-cond-vp"
    c.pairs.update(
        count=100_000,  # the classes in turn
        steps=18,  # 35 network calls
        solver="heun",
        guidance_scale=1.0,
        batch_size=1024,
        dtype="float32",
        latent_dtype="float32",
    )
    c.loss.update(name="lpips", lpips="metric/lpips", size=224)
    c.adversarial.weight = 0.0
    c.optimizer.generator.update(
        learning_rate=5e-5,
        betas=(0.9, 0.999),
        weight_decay=0.01,
        warmup_images=500 * BATCH,
        gradient_clip=10.0,
        moment_dtype="float32",
    )
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
